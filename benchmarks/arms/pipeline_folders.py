"""Folders of a pipeline: their samples after a move, in other hands, of another layout, and from strangers."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.arms.diffusers_pipelines import CASES, build_ensemble
from benchmarks.record import Claim, Listing
from benchmarks.testbed.hostile_pipelines import list_attacks
from benchmarks.testbed.paris_layout import (
    CHANNELS,
    EXPERTS,
    HEADS,
    SIDE,
    TEXT,
    ParisReference,
    expert_weights,
    router_weights,
    write_paris,
)
from ddm_core.artifacts import ArtifactError
from ensemble.pipeline_folder import PipelineError
from ensemble.pipelines.diffusion_pipeline import EnsembleDiffusionPipeline
from ensemble.pipelines.paris import convert_expert, convert_router, import_paris
from experts.conditions.condition import Condition
from experts.conditions.null_text import set_null_text
from experts.conditions.text_embedding import TextEmbedding
from experts.networks.registry import call_network

SEEDS, STEPS = range(8), 3
EXPORTED = ("SD3Transformer2DModel", "PixArtTransformer2DModel", "FluxTransformer2DModel")
OURS = ("ddm", "ddm_core", "data_partition", "experts", "router", "ensemble", "orchestrator", "benchmarks")
WITHOUT_US = """
import sys
for name in {ours!r}: sys.modules[name] = None
import numpy as np
from safetensors.torch import load_file
from diffusers import DiffusionPipeline, {network}
sums = [
    sum(p.double().sum().item() for p in {network}.from_pretrained({folder!r}, subfolder=f"expert_{{k}}").parameters())
    for k in range({experts})
]
try:
    DiffusionPipeline.from_pretrained({folder!r})
except ValueError as error:
    refused = "trust_remote_code" in str(error)
pipe = DiffusionPipeline.from_pretrained({folder!r}, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
text = {{name: value.repeat(len({seeds!r}), *[1] * (value.ndim - 1)) for name, value in load_file({inputs!r}).items()}}
latents = pipe(seeds={seeds!r}, **text, num_inference_steps={steps}, output_type="latent").images
np.savez({out!r}, latents=latents.numpy(), sums=sums, refused=refused)
"""


def measure_folders() -> tuple[list[Claim], Listing]:
    """Sample before a pipeline is saved, after it is loaded, after its folder has moved; in a batch and alone."""
    rows, equal, alone = [], 0, 0.0
    for name in CASES:
        pipeline, text = build_ensemble(name, EXPERTS)
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "saved"
            pipeline.save_pretrained(folder)
            batch = [_sample(pipeline, text, SEEDS), _sample(_load(folder), text, SEEDS)]
            folder.rename(Path(parent) / "moved")
            moved = _load(Path(parent) / "moved")
            batch.append(_sample(moved, text, SEEDS))
            single = torch.cat([_sample(moved, text, [seed]) for seed in SEEDS])
        same = all(torch.equal(batch[0], other) for other in batch[1:])
        images = sum(torch.equal(*_bytes(a, b)) for a, b in zip(batch[0], single, strict=True))
        difference = float((single - batch[0]).abs().max())
        equal, alone = equal + same, max(alone, difference)
        rows.append((name, "yes" if same else "no", f"{images} of {len(SEEDS)}", f"{difference:.1e}"))
    claims = [
        Claim(
            name="save, load, sample; move the folder, sample: latents",
            bar=f"same bytes, {len(CASES)} of {len(CASES)} classes",
            value=f"{equal} of {len(CASES)}",
            spread=f"{len(SEEDS)} seeds, {EXPERTS} experts",
            holds=equal == len(CASES),
        ),
        Claim(
            name="seeds alone and in a batch, after loading: images",
            bar="same bytes; latents differ by at most 1e-5",
            value=f"latents {alone:.1e}",
            spread=", ".join(row[2] for row in rows),
            holds=alone <= 1e-5 and all(row[2] == f"{len(SEEDS)} of {len(SEEDS)}" for row in rows),
        ),
    ]
    columns = ("network", "same bytes after loading and moving", "images alone = in the batch", "largest difference")
    return claims, Listing(title=f"Saved, loaded, moved: {EXPERTS} experts", columns=columns, rows=rows)


def _load(folder: Path) -> Any:
    pipeline = EnsembleDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _sample(pipeline: Any, text: Mapping[str, Tensor], seeds: Any) -> Tensor:
    rows = {name: value.repeat(len(seeds), *[1] * (value.ndim - 1)) for name, value in text.items()}
    latents: Tensor = pipeline(seeds=seeds, **rows, num_inference_steps=STEPS, output_type="latent").images
    return latents


def _bytes(*latents: Tensor) -> list[Tensor]:
    return [((each + 1) * 127.5).round().clamp(0, 255).byte() for each in latents]


def measure_without_us() -> tuple[list[Claim], Listing]:
    """Load components and exported folders in processes that cannot import this package."""
    rows = []
    for name in EXPORTED:
        pipeline, text = build_ensemble(name, EXPERTS)
        expected = _sample(pipeline, text, SEEDS)
        with tempfile.TemporaryDirectory() as parent:
            names = {part: str(Path(parent) / part) for part in ("folder", "inputs.safetensors", "out.npz")}
            pipeline.export_pretrained(names["folder"])
            save_file(text, names["inputs.safetensors"])
            code = WITHOUT_US.format(
                ours=OURS,
                network=name,
                folder=names["folder"],
                experts=EXPERTS,
                inputs=names["inputs.safetensors"],
                seeds=list(SEEDS),
                steps=STEPS,
                out=names["out.npz"],
            )
            environment = os.environ | {"HF_HOME": parent, "HF_HUB_OFFLINE": "1"}
            subprocess.run([sys.executable, "-c", code], cwd="/", env=environment, check=True, capture_output=True)
            found = np.load(names["out.npz"])
        sums = [
            sum(parameter.double().sum().item() for parameter in getattr(pipeline, f"expert_{k}").parameters())
            for k in range(EXPERTS)
        ]
        latents = torch.from_numpy(found["latents"])
        images = sum(torch.equal(*_bytes(a, b)) for a, b in zip(expected, latents, strict=True))
        loaded = int((found["sums"] == sums).sum())
        rows.append((name, loaded, bool(found["refused"]), images, float((latents - expected).abs().max())))
    columns = ("network", "components equal", "refused without trust", "images equal", "largest difference")
    text_rows = [(name, str(n), "yes" if r else "no", f"{i} of {len(SEEDS)}", f"{d:.1e}") for name, n, r, i, d in rows]
    claim = Claim(
        name="a process without this package: components load, the exported folder samples the same images",
        bar="same bytes with trust_remote_code=True, refused without",
        value=f"{sum(row[3] for row in rows)} of {len(rows) * len(SEEDS)} images",
        spread=f"latents differ by at most {max(row[4] for row in rows):.1e}",
        holds=all(row[1:4] == (EXPERTS, True, len(SEEDS)) for row in rows),
    )
    return [claim], Listing(title="Without this package", columns=columns, rows=text_rows)


@torch.no_grad()
def measure_paris() -> tuple[list[Claim], Listing]:
    """Compare converted networks of Paris' layout with forward passes that import nothing of ours."""
    generator = torch.Generator().manual_seed(1)
    noised = torch.randn(8, CHANNELS, SIDE, SIDE, generator=generator)
    sequence, t = torch.randn(8, 7, TEXT, generator=generator), torch.linspace(0.003, 0.9985, 8)
    text = TextEmbedding(sequence, torch.ones(8, 7).bool(), torch.zeros(8, 0), torch.zeros(8).bool())
    condition, differences = Condition(torch.full((8,), -1), text), {}
    for k in range(EXPERTS):
        network = set_null_text(convert_expert(expert_weights(k), HEADS), text.rows(slice(1)))
        expected = ParisReference(expert_weights(k)).velocity(noised, 1000 * t, sequence)
        differences[f"expert {k}"] = float((call_network(network, noised, t, condition) - expected).abs().max())
    logits = convert_router(router_weights(), HEADS).logits(noised, t, Condition.null(8))
    deviation = logits - ParisReference(router_weights()).logits(noised, 1000 * t)
    differences["router"] = float((deviation - deviation[:, :1]).abs().max())
    keys = list(expert_weights())
    changed = [{name: value for name, value in expert_weights().items() if name != key} for key in keys] + [
        expert_weights() | {f"{key}.extra": torch.zeros(1)} for key in keys
    ]
    strict = sum(_is_refused(tensors) for tensors in changed)
    positions = [
        expert_weights() | {"pos_embed": value}
        for value in (torch.randn(1, (SIDE // 2) ** 2, 32), expert_weights()["pos_embed"] + 0.01)
    ]
    largest = max(differences.values())
    claims = [
        Claim(
            name=f"Paris' layout, synthetic weights, {EXPERTS} experts and router, against a reference forward pass",
            bar="outputs differ by at most 1e-5",
            value=f"{largest:.1e}",
            spread="",
            holds=largest <= 1e-5,
        ),
        Claim(
            name=f"the same: each of {len(keys)} tensors is used once; one less or one more is refused",
            bar=f"{len(changed)} of {len(changed)} refused",
            value=f"{strict} of {len(changed)}",
            spread="",
            holds=strict == len(changed),
        ),
        Claim(
            name="the same: positions that are not the table of sines are refused",
            bar=f"{len(positions)} of {len(positions)}",
            value=f"{sum(map(_is_refused, positions))} of {len(positions)}",
            spread="",
            holds=all(map(_is_refused, positions)),
        ),
    ]
    with tempfile.TemporaryDirectory() as parent:
        imported: Any = import_paris(write_paris(Path(parent) / "paris"))
        imported.set_progress_bar_config(disable=True)
        imported.save_pretrained(Path(parent) / "saved")
        shutil.rmtree(Path(parent) / "paris")
        arguments = {"seeds": SEEDS, "num_inference_steps": STEPS, "guidance_scale": 2.0, "output_type": "latent"}
        samples = [
            pipeline(["a"] * len(SEEDS), **arguments).images for pipeline in (imported, _load(Path(parent) / "saved"))
        ]
    claims.append(
        Claim(
            name="the same, imported, saved, loaded without the published folder: samples of a prompt",
            bar="same bytes",
            value="same bytes" if torch.equal(*samples) else f"{float((samples[0] - samples[1]).abs().max()):.1e}",
            spread=f"{len(SEEDS)} seeds",
            holds=torch.equal(*samples),
        )
    )
    rows = [(name, f"{value:.1e}") for name, value in differences.items()]
    return claims, Listing(title="Paris", columns=("network", "largest difference"), rows=rows)


def _is_refused(tensors: dict[str, Tensor]) -> bool:
    try:
        convert_expert(tensors, HEADS)
    except PipelineError:
        return True
    return False


def measure_hostile() -> tuple[list[Claim], Listing]:
    """Load folders that were changed to run code, read other files or fill the memory, and count those refused."""
    attacks, refused, peaks = list_attacks(EXPERTS), 0, dict[str, float]()
    with tempfile.TemporaryDirectory() as parent:
        valid = Path(parent) / "valid"
        build_ensemble("PixArtTransformer2DModel", EXPERTS)[0].save_pretrained(valid)
        _load(valid)
        for name, attack in attacks.items():
            folder = Path(parent) / "changed"
            shutil.copytree(valid, folder)
            attack(folder)
            before = _reset_peak_mb()
            try:
                EnsembleDiffusionPipeline.from_pretrained(folder)
            except ArtifactError:
                refused += 1
            peaks[name] = _memory_mb("VmHWM") - before
            shutil.rmtree(folder)
    claim = Claim(
        name="folders of strangers: pickles, code, links, headers of 1 GB, tensors of 4 TB, huge networks",
        bar=f"{len(attacks)} of {len(attacks)} refused, each with at most 50 MB more memory",
        value=f"{refused} of {len(attacks)}, {max(peaks.values()):.0f} MB",
        spread="",
        holds=refused == len(attacks) and max(peaks.values()) <= 50,
    )
    largest = sorted(peaks, key=lambda name: -peaks[name])[:5]
    rows = [(name, f"{peaks[name]:.1f}") for name in largest]
    return [claim], Listing(title="Hostile folders: most memory", columns=("attack", "peak over start, MB"), rows=rows)


def _reset_peak_mb() -> float:
    """Set the peak of this process' memory to its present size, and return that."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _memory_mb("VmRSS")


def _memory_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))
