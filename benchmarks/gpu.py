"""One GPU and eight minutes (`make bench-gpu`): the trainer, the sampler and packed layers in 16 bits.

1. A training step of DiT-B/2, PixArt and SD3, by `fit` and by `arms/bare_loop.py`, compiled and with checkpointing.
2. Sampling from eight experts that are all loaded, loaded one after the other, or loaded by need.
3. Packed weights of 8 and 4 bits, and whether a row alone has the bits that it has in a batch.

On a CPU everything runs at a tiny size and writes nothing, so that the script cannot rot.
"""

import argparse
import json
import tempfile
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.arms import bare_loop
from benchmarks.arms.trainer.cases import LOSS
from benchmarks.arms.trainer.sampling import make_ensemble
from benchmarks.record import Claim, Listing, describe_machine, write_result
from ddm_core.artifacts import Workspace
from ensemble.compression.quantization.layers import pack_rest
from ensemble.pipeline import EnsemblePipeline
from ensemble.pipelines.diffusion_pipeline import EnsembleDiffusionPipeline
from ensemble.pipelines.paging import weight_bytes
from experts.codec import PixelCodec
from experts.conditions.condition import Condition
from experts.conditions.text_embedding import TextEmbedding
from experts.config import DiffusersConfig, DiTConfig, NetworkConfig, SettingValue, TrainingConfig
from experts.networks.registry import build_network, call_network, enable_gradient_checkpointing
from experts.training.latent_dataset import LatentDataset
from experts.training.trainer import fit

CLASSES = 10
VARIANTS = {"plain": {}, "checkpointing": {"gradient_checkpointing": True}, "compiled": {"compile": True}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How large the networks are, and how long each is measured."""

    device: str
    shape: tuple[int, int, int]
    batch_size: int
    steps: int
    """Measured steps of a training, after twice as many to warm up."""
    networks: dict[str, NetworkConfig]
    experts: int
    autocast: Literal["none", "bfloat16"]
    dtype: torch.dtype


def transformers(heads: int, width: int, depth: int) -> dict[str, NetworkConfig]:
    """Return DiT, PixArt and SD3 of one size."""
    shared: dict[str, SettingValue] = {
        "num_attention_heads": heads,
        "attention_head_dim": width,
        "num_layers": depth,
        "patch_size": 2,
    }
    pixart = shared | {"cross_attention_dim": heads * width, "use_additional_conditions": False}
    sd3 = shared | {"caption_projection_dim": heads * width, "pos_embed_max_size": 96, "qk_norm": "rms_norm"}
    return {
        "DiT-B/2": DiTConfig(patch_size=2, heads=heads, head_width=width, depth=depth),
        "PixArt": DiffusersConfig(class_name="PixArtTransformer2DModel", settings=pixart),
        "SD3": DiffusersConfig(class_name="SD3Transformer2DModel", settings=sd3),
    }


def gpu_size() -> Size:
    """Return the size for one GPU."""
    return Size(
        device="cuda",
        shape=(4, 32, 32),
        batch_size=64,
        steps=20,
        networks=transformers(12, 64, 12),
        experts=8,
        autocast="bfloat16",
        dtype=torch.bfloat16,
    )


def tiny_size() -> Size:
    """Return the size for a CPU."""
    return Size(
        device="cpu",
        shape=(4, 8, 8),
        batch_size=2,
        steps=1,
        networks=transformers(2, 8, 1),
        experts=3,
        autocast="none",
        dtype=torch.float32,
    )


def main() -> None:
    """Measure what this machine can, and write docs/benchmarks/gpu.json where there is a GPU."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    has_gpu, started = torch.cuda.is_available(), time.monotonic()
    size = gpu_size() if has_gpu else tiny_size()
    variants = VARIANTS if has_gpu else {name: options for name, options in VARIANTS.items() if name != "compiled"}
    claims, listings = measure(size, variants)
    for listing in listings:
        print(listing.title, *listing.rows, sep="\n", flush=True)
    if has_gpu:
        machine = f"{torch.cuda.get_device_name()}, {describe_machine()}"
        write_result("gpu", time.monotonic() - started, claims, listings, machine=machine)


def measure(size: Size, variants: dict[str, dict[str, bool]]) -> tuple[list[Claim], list[Listing]]:
    """Measure everything; return the claims and the tables."""
    training = Listing(
        title="A training step",
        columns=("network", "variant", "ms", "over the plain loop", "peak memory (GB)"),
        rows=[row for name in size.networks for row in training_rows(name, size, variants)],
    )
    sampling = Listing(
        title="Sampling from experts", columns=("residency", "s", "peak memory (GB)"), rows=sampling_rows(size)
    )
    layers = Listing(
        title="A call of DiT-B/2",
        columns=("weights", "ms", "peak memory (GB)", "error, relative", "a row alone equals itself in a batch"),
        rows=call_rows(size),
    )
    ratios = [float(row[3]) for row in training.rows if row[1] == "plain"]
    claim = Claim(
        name="a step of `fit` over that of a plain loop, the slowest of three networks",
        bar="≤ 1.02",
        value=f"{max(ratios):.3f}",
        spread=f"n = {len(ratios)} networks",
        holds=max(ratios) <= 1.02,
    )
    return [claim], [training, sampling, layers]


def make_network(network: NetworkConfig, size: Size) -> nn.Module:
    """Return a network with parameters from a fixed seed; those of text read 16 tokens."""
    text = None if network.kind == "dit" else TextEmbedding.zeros(16, 64, 64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_network(network, size.shape, CLASSES if text is None else 0, text)


def training_rows(name: str, size: Size, variants: dict[str, dict[str, bool]]) -> list[tuple[str, ...]]:
    """Return a row of the table for each variant of one network, after one for the plain loop."""
    data = LatentDataset(
        clean=torch.randn(512, *size.shape, generator=torch.Generator().manual_seed(0)),
        class_id=torch.arange(512) % CLASSES if name.startswith("DiT") else torch.full((512,), -1),
        cluster_id=torch.zeros(512, dtype=torch.int64),
    )
    reset_memory(size)
    bare_s = run_bare(name, size, data)
    rows: list[tuple[str, ...]] = [(name, "plain loop", f"{1e3 * bare_s:.1f}", "1", f"{peak_gb(size):.2f}")]
    for variant, options in variants.items():
        reset_memory(size)
        step_s = run_fit(name, size, data, options)
        rows.append((name, variant, f"{1e3 * step_s:.1f}", f"{step_s / bare_s:.3f}", f"{peak_gb(size):.2f}"))
    return rows


def run_fit(name: str, size: Size, data: LatentDataset, options: dict[str, bool]) -> float:
    """Train with `fit`, and return the seconds of one of the last steps, from its own row of metrics."""
    model = make_network(size.networks[name], size)
    if options.get("gradient_checkpointing"):
        enable_gradient_checkpointing(model)
    config = TrainingConfig(
        steps=3 * size.steps,
        batch_size=size.batch_size,
        log_every=size.steps,
        warmup_steps=1,
        checkpoint_every=10**6,
        autocast=size.autocast,
        device=size.device,
        compile=options.get("compile", False),
    )
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace.at(Path(folder))
        fit(model, LOSS, data, config, workspace)
        *_, last = (workspace.attempt / "metrics.jsonl").read_text().splitlines()
    return size.batch_size / float(json.loads(last)["samples_per_s"])


def run_bare(name: str, size: Size, data: LatentDataset) -> float:
    """Train with the plain loop, and return the seconds of one of the last steps; text is the null text."""
    call = bare_loop.CALLS["dit"] if name.startswith("DiT") else call_without_text
    model = make_network(size.networks[name], size)
    with torch.autocast(size.device, torch.bfloat16, enabled=size.autocast != "none"):
        seconds = bare_loop.train(
            model,
            call,
            data.clean,
            data.class_id,
            steps=3 * size.steps,
            log_every=size.steps,
            batch_size=size.batch_size,
            warmup=1,
            device=size.device,
        )
    return seconds[-1] / size.steps


def call_without_text(model: nn.Module, noised: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """Return the prediction of a network of text for its null text."""
    return call_network(model, noised, t, Condition.null(len(label), noised.device))


def sampling_rows(size: Size) -> list[tuple[str, ...]]:
    """Return a row for each way to keep the experts."""
    case_network = size.networks["DiT-B/2"]
    ensemble = make_ensemble(lambda: make_network(case_network, size), size.shape, size.experts)
    rows: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "pipeline"
        codec = PixelCodec(image_shape=(*size.shape[1:], size.shape[0]))
        EnsemblePipeline(ensemble=ensemble, codec=codec, num_classes=CLASSES).save_pretrained(folder)
        one = weight_bytes(folder / "expert_0")
        for label, budget, selection in (
            ("all", None, "sticky"),
            ("grouped", 2 * one, "sticky"),
            ("paged", 2 * one, "top_k"),
        ):
            pipeline = EnsembleDiffusionPipeline.from_pretrained(folder, dtype=size.dtype, max_memory=budget)
            pipeline = pipeline.to(size.device)
            pipeline.set_progress_bar_config(disable=True)
            reset_memory(size)
            started = time.perf_counter()
            pipeline(seeds=range(2 * size.experts), num_inference_steps=4, selection=selection, output_type="latent")
            synchronize(size)
            rows.append((label, f"{time.perf_counter() - started:.2f}", f"{peak_gb(size):.2f}"))
    return rows


def call_rows(size: Size) -> list[tuple[str, ...]]:
    """Return a row for plain weights, and for weights of 8 and of 4 bits."""
    plain = make_network(size.networks["DiT-B/2"], size).eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.02)
    noised = torch.randn(size.batch_size, *size.shape, generator=torch.Generator().manual_seed(2))
    noised, reference = noised.to(size.device, size.dtype), None
    table: list[tuple[str, ...]] = []
    t = torch.linspace(0.1, 0.9, size.batch_size, device=size.device)
    for bits in (None, 8, 4):
        model = deepcopy(plain)
        pack_rest(model, bits, 16, 16)
        model = model.to(size.device, size.dtype)
        reset_memory(size)

        def call(model: nn.Module = model, rows: slice = slice(None)) -> Tensor:
            with torch.inference_mode():
                return call_network(
                    model, noised[rows], t[rows].to(size.dtype), Condition.null(len(t[rows]), size.device)
                )

        output, times = call(), []
        for _ in range(5):
            synchronize(size)
            started = time.perf_counter()
            call()
            synchronize(size)
            times.append(time.perf_counter() - started)
        reference = output if reference is None else reference
        error = float((output - reference).float().norm() / reference.float().norm())
        alone = torch.equal(call(rows=slice(0, 1)), output[:1])
        name = "plain" if bits is None else f"{bits} bits"
        cells = (f"{1e3 * median(times):.2f}", f"{peak_gb(size):.2f}", f"{error:.4f}", "yes" if alone else "no")
        table.append((name, *cells))
    return table


def reset_memory(size: Size) -> None:
    """Forget the peak memory so far."""
    if size.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb(size: Size) -> float:
    """Return the peak memory since `reset_memory`; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if size.device == "cuda" else 0.0


def synchronize(size: Size) -> None:
    """Wait for the device."""
    if size.device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
