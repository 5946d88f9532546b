"""Peak host memory of a training in parts, with checkpointing and with offloading, each in a process of its own.

python -m benchmarks.arms.trainer.memory NETWORK WAY prints what was measured and what `ddm plan` counts.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.arms.trainer.cases import CLASSES, LOSS, Effort, Measured
from benchmarks.record import Claim, Listing
from benchmarks.testbed.peak_memory import watching_memory
from ddm_core.artifacts import Workspace
from experts.conditions.text_embedding import TextEmbedding
from experts.config import (
    DiffusersConfig,
    DiTConfig,
    ExpertConfig,
    NetworkConfig,
    ResidualMLPConfig,
    TrainingConfig,
    UNetConfig,
)
from experts.networks.adapters.adapter import DataShape
from experts.networks.registry import build_network, enable_gradient_checkpointing
from experts.training.latent_dataset import LatentDataset
from experts.training.trainer import fit

MEGA = 1e6
WIDTHS: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 48, "patch_size": 2}
SD3 = WIDTHS | {"num_layers": 4, "caption_projection_dim": 192, "pos_embed_max_size": 96, "qk_norm": "rms_norm"}
PIXART = WIDTHS | {"num_layers": 6, "cross_attention_dim": 192, "use_additional_conditions": False}
OF_CLASSES = DataShape(latent_shape=(4, 32, 32), num_classes=CLASSES)
OF_TEXT = DataShape(latent_shape=(8, 32, 32), text_shape=(16, 384, 384))
NETWORKS: dict[str, tuple[NetworkConfig, DataShape]] = {
    "MLP": (ResidualMLPConfig(width=1024, depth=4), DataShape(latent_shape=(6, 4, 4), num_classes=CLASSES)),
    "U-Net": (UNetConfig(), OF_CLASSES),
    "DiT": (DiTConfig(depth=8), OF_CLASSES),
    "PixArt": (DiffusersConfig(class_name="PixArtTransformer2DModel", settings=PIXART), OF_TEXT),
    "SD3": (DiffusersConfig(class_name="SD3Transformer2DModel", settings=SD3), OF_TEXT),
}
"""A network of each class, and its data."""

LATE_IMPORT = "diffusers.hooks.group_offloading"
"""What diffusers imports when a network is moved for the first time: 514 modules, 30 MB, no part of a training."""

TRAINING = TrainingConfig(batch_size=32, steps=3, warmup_steps=0, log_every=3)
WAYS = {
    "plain": TRAINING,
    "4 parts": replace(TRAINING, accumulate=4),
    "checkpointing": replace(TRAINING, gradient_checkpointing=True),
    "offload": replace(TRAINING, offload=("optimizer", "average")),
}


def measure_memory(effort: Effort) -> Measured:
    """Measure every network in every way; a tiny measurement takes the first network."""
    names = list(NETWORKS)[:1] if effort.is_tiny else list(NETWORKS)
    measured = {name: {way: measure_apart(name, way) for way in WAYS if has_way(name, way)} for name in names}
    claims = [
        smaller_claim("in 4 parts over that of the whole batch, transformers and U-Net", 0.5, measured, "4 parts"),
        smaller_claim("with checkpointing over that without, transformers and U-Net", 0.7, measured, "checkpointing"),
        smaller_claim("offloaded on a CPU over that in place, all networks", 1.02, measured, "offload"),
        counted_claim(measured),
    ]
    return claims, [memory_listing(measured)]


def has_way(name: str, way: str) -> bool:
    """Return whether a network can train in a way: the MLP has no checkpointing."""
    return name != "MLP" or way != "checkpointing"


Sizes = dict[str, dict[str, dict[str, float]]]
"""Measured and counted bytes by network and way."""


def smaller_claim(name: str, limit: float, measured: Sizes, way: str) -> Claim:
    """Return the claim that a way needs at most so much of the plain training's memory, in every network.

    The memory of the MLP is that of its parameters, which no part of a batch makes smaller.
    """
    ratios = [
        sizes[way]["measured"] / sizes["plain"]["measured"]
        for network, sizes in measured.items()
        if way in sizes and (network != "MLP" or way == "offload" or len(measured) == 1)
    ] or [1.0]
    return Claim(
        name=f"memory: peak on the host {name}",
        bar=f"≤ {limit:g}",
        value=f"{max(ratios):.2f}",
        spread=f"{min(ratios):.2f} to {max(ratios):.2f}, n = {len(ratios)} networks",
        holds=max(ratios) <= limit,
    )


def counted_claim(measured: Sizes) -> Claim:
    """Return the claim that `ddm plan` counts what is measured, where nothing is offloaded."""
    ratios = [
        size["counted"] / size["measured"]
        for sizes in measured.values()
        for way, size in sizes.items()
        if way != "offload"
    ]
    off = max(abs(ratio - 1) for ratio in ratios)
    return Claim(
        name="memory: peak that `ddm plan` counts over the measured one",
        bar="15 % off",
        value=f"{off:.1%} off",
        spread=f"{min(ratios):.3f} to {max(ratios):.3f}, n = {len(ratios)}",
        holds=off <= 0.15,
    )


def memory_listing(measured: Sizes) -> Listing:
    """Return what was measured and counted; of offloading, the count is what stays on the device."""
    rows = [
        (name, way, f"{size['measured'] / MEGA:,.0f}", f"{size['counted'] / MEGA:,.0f}")
        for name, sizes in measured.items()
        for way, size in sizes.items()
    ]
    columns = ("network", "training", "MB on the host, measured", "MB on the training's device, counted")
    return Listing(title=f"memory: peak of three steps of {TRAINING.batch_size} samples", columns=columns, rows=rows)


def measure_apart(name: str, way: str) -> dict[str, float]:
    """Train in a process of its own, and return the measured and the counted bytes."""
    command = [sys.executable, "-m", "benchmarks.arms.trainer.memory", name, way]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory returns to the system
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    sizes: dict[str, float] = json.loads(output.splitlines()[-1])
    return sizes


def measure_here(name: str, way: str) -> dict[str, float]:
    """Train for three steps, and return the measured and the counted bytes."""
    from orchestrator.planning.network_sizes import measure_expert

    (network, data), training = NETWORKS[name], WAYS[way]
    counted = measure_expert(ExpertConfig(network=network, training=training), data).memory_bytes
    import_module(LATE_IMPORT)
    with watching_memory() as seen, tempfile.TemporaryDirectory() as folder:
        null_text = None if data.text_shape is None else TextEmbedding.zeros(*data.text_shape)
        model = build_network(network, data.latent_shape, data.num_classes, null_text)
        if training.gradient_checkpointing:
            enable_gradient_checkpointing(model)
        dataset = LatentDataset(
            clean=torch.randn(training.batch_size, *data.latent_shape),
            class_id=torch.full((training.batch_size,), -1),
            cluster_id=torch.zeros(training.batch_size, dtype=torch.int64),
        )
        fit(model, LOSS, dataset, training, Workspace.at(Path(folder)))
    return {"measured": max(seen), "counted": counted}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure_here(*sys.argv[1:])))
