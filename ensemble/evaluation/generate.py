"""Images of a pipeline folder, batch by batch; finished batches survive a restart.

Image i depends on seed i alone. The same seeds of two pipelines start from the same noise, so their grids can be
compared image by image.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from safetensors.numpy import load_file

from ddm_core.artifacts import Preempted, Workspace, fingerprint, list_files, save_arrays
from ddm_core.files.checksums import checksum
from ensemble.config import SamplingConfig
from ensemble.membership import missing_warning
from ensemble.pipeline import EnsemblePipeline
from ensemble.routing import CallCounts
from ensemble.sampling.images import to_bytes
from ensemble.sampling.prompts import Prompts
from ensemble.sampling.sample import SampleResult
from experts.conditions.condition import Condition
from experts.training.flops import forward_flops

log = logging.getLogger(__name__)

WEAK = "weak_"
"""Prefix of the arrays and files of a reflection's weak ensemble."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedImages:
    """Images and their cost."""

    images: UInt8[np.ndarray, "batch height width channel"]
    calls: CallCounts
    flops: float
    """Of all expert and router calls, and of the texts."""


def generate(
    folder: Path,
    seeds: Sequence[int],
    prompts: Prompts | None,
    sampling: SamplingConfig,
    workspace: Workspace,
) -> GeneratedImages:
    """Generate one image per seed; batches that an earlier attempt finished are loaded, not sampled again.

    A pipeline without classes gets the captions alone. Raises `Preempted` between two batches on a stop request.
    """
    pipeline = EnsemblePipeline.from_pretrained(folder)
    prompts = prompts and prompts.for_classes(pipeline.num_classes)
    if warning := missing_warning(pipeline.ensemble):
        log.warning(warning)
    weak = pipeline.load_weak(sampling)
    costs, weak_costs = RowFlops.measure(pipeline), weak and RowFlops.measure(replace(pipeline, ensemble=weak))
    finished = workspace.scratch / f"images-{_identity(folder, seeds, prompts, sampling)}"
    finished.mkdir(parents=True, exist_ok=True)
    images, calls = [], CallCounts()
    for start in range(0, len(seeds), sampling.batch_size):
        workspace.report_progress(start, len(seeds), unit="images")
        if workspace.stop_requested():
            raise Preempted(f"stopped after {start} of {len(seeds)} images, which are saved")
        rows = slice(start, start + sampling.batch_size)
        file = finished / f"{start:08d}.safetensors"
        if not file.exists():
            _write(file, pipeline(seeds[rows], sampling, prompts and prompts.rows(rows), weak=weak))
        arrays = load_file(file)
        images.append(arrays["images"])
        calls.add(_calls_from_arrays(arrays))
    workspace.report_progress(len(seeds), len(seeds), unit="images")
    flops = costs.times(calls) + (weak_costs.times(calls.weak) if weak_costs and calls.weak else 0.0)
    flops += costs.text * sum(map(bool, prompts.captions if prompts else ()))
    return GeneratedImages(images=np.concatenate(images), calls=calls, flops=flops)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFlops:
    """FLOPs of one call on one row."""

    experts: dict[int, float]
    """Of an expert at a uniformly random t, by its id."""
    networks: dict[str, float]
    """Of each of their networks, by its name in `CallCounts.full_calls`."""
    router: float
    text: float
    """Of encoding a caption, and of p(k | text)."""

    @classmethod
    def measure(cls, pipeline: EnsemblePipeline) -> "RowFlops":
        """Count the operators that every expert and the router call."""
        ensemble, router = pipeline.ensemble, pipeline.ensemble.router
        experts = {k: expert.call_flops(ensemble.noise_schedule) for k, expert in ensemble.experts.items()}
        row, t = torch.zeros(1, *pipeline.codec.latent_shape), torch.full((1,), 0.5)
        return cls(
            experts={k: flops.mean for k, flops in experts.items()},
            networks={f"{k}{name}": cost for k, flops in experts.items() for name, cost in flops.networks.items()},
            router=forward_flops(partial(router.logits, row, t, Condition.null(1))) if router else 0.0,
            text=pipeline.text_flops(),
        )

    def times(self, calls: CallCounts) -> float:
        """Return the FLOPs of these calls."""
        experts = sum(self.networks[name] * count for name, count in calls.full_calls.items())
        return experts + self.router * calls.router


def _identity(folder: Path, seeds: Sequence[int], prompts: Prompts | None, sampling: SamplingConfig) -> str:
    """Return a fingerprint of everything that the images depend on, as 16 hex digits."""
    files = {str(path.relative_to(folder)): checksum(path) for path in list_files(folder)}
    if sampling.reflection is not None and sampling.reflection.path:
        weak = Path(sampling.reflection.path).expanduser()
        files |= {f"{WEAK}{path.relative_to(weak)}": checksum(path) for path in list_files(weak)}
    return fingerprint("images", [list(seeds), prompts, sampling], files)[:16]


def _write(file: Path, result: SampleResult) -> None:
    arrays = {"images": to_bytes(result.images)} | _calls_to_arrays(result.calls, "")
    if result.calls.weak is not None:
        arrays |= _calls_to_arrays(result.calls.weak, WEAK)
    temporary = file.with_name(f".{file.name}")
    save_arrays(temporary, arrays)
    temporary.replace(file)


def _calls_to_arrays(calls: CallCounts, prefix: str) -> dict[str, np.ndarray]:
    ids, names = sorted(calls.experts), sorted(calls.full_calls)
    return {
        f"{prefix}expert_ids": np.array(ids, np.int64),
        f"{prefix}expert_calls": np.array([calls.experts[k] for k in ids], np.int64),
        f"{prefix}networks": np.frombuffer("\n".join(names).encode(), np.uint8),
        f"{prefix}network_calls": np.array([calls.full_calls[name] for name in names], np.float64),
        f"{prefix}router_calls": np.array([calls.router], np.int64),
        f"{prefix}evaluations": np.array([calls.evaluations], np.int64),
    }


def _calls_from_arrays(arrays: dict[str, np.ndarray], prefix: str = "") -> CallCounts:
    ids, counts = arrays[f"{prefix}expert_ids"].tolist(), arrays[f"{prefix}expert_calls"].tolist()
    names = arrays[f"{prefix}networks"].tobytes().decode().splitlines()
    return CallCounts(
        experts=Counter(dict(zip(ids, counts, strict=True))),
        full_calls=dict(zip(names, arrays[f"{prefix}network_calls"].tolist(), strict=True)),
        router=int(arrays[f"{prefix}router_calls"][0]),
        evaluations=int(arrays[f"{prefix}evaluations"][0]),
        weak=_calls_from_arrays(arrays, WEAK) if not prefix and f"{WEAK}expert_ids" in arrays else None,
    )
