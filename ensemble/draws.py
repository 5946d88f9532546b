"""Images from a pipeline folder, batch by batch, kept between two attempts.

Image i depends on seed i alone, so the same seeds of two pipelines start from the same noise, and their
grids can be looked at side by side.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from safetensors.numpy import load_file

from artifacts import Preempted, Workspace, checksum, files_in, fingerprint, save_arrays
from ensemble.config import SamplingConfig
from ensemble.images import to_bytes
from ensemble.pipeline import DDMPipeline
from ensemble.routing import Calls
from ensemble.sample import Samples
from experts.condition import Condition
from experts.flops import forward_flops


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Images and what they cost."""

    images: UInt8[np.ndarray, "batch height width channel"]
    calls: Calls
    flops: float
    """Of all expert and router calls."""


def draw(
    folder: Path,
    seeds: Sequence[int],
    class_ids: Sequence[int] | None,
    sampling: SamplingConfig,
    workspace: Workspace,
) -> Drawn:
    """One image for each seed; batches that an earlier attempt finished are read, not drawn again.

    Raises `Preempted` between two batches if it is asked to stop.
    """
    pipeline = DDMPipeline.from_pretrained(folder)
    costs = RowFlops.of(pipeline)
    kept = workspace.scratch / f"images-{_identity(folder, seeds, class_ids, sampling)}"
    kept.mkdir(parents=True, exist_ok=True)
    images, calls = [], Calls()
    for start in range(0, len(seeds), sampling.batch_size):
        workspace.report(start, len(seeds), unit="images")
        if workspace.stop_requested():
            raise Preempted(f"stopped after {start} of {len(seeds)} images, which are kept")
        rows = slice(start, start + sampling.batch_size)
        file = kept / f"{start:08d}.safetensors"
        if not file.exists():
            _write(file, pipeline(seeds[rows], sampling, class_ids and class_ids[rows]))
        found = load_file(file)
        images.append(found["images"])
        calls.add(_calls_of(found))
    workspace.report(len(seeds), len(seeds), unit="images")
    return Drawn(images=np.concatenate(images), calls=calls, flops=costs.times(calls))


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFlops:
    """Floating point operations of one call on one row."""

    experts: dict[int, float]
    router: float

    @classmethod
    def of(cls, pipeline: DDMPipeline) -> "RowFlops":
        """Counted from the operators that every expert and the router call."""
        ensemble = pipeline.ensemble
        row, t, null = torch.zeros(1, *pipeline.codec.latent_shape), torch.full((1,), 0.5), Condition.null(1)
        return cls(
            experts={
                k: forward_flops(partial(expert.velocity, row, t, null, ensemble.path))
                for k, expert in ensemble.experts.items()
            },
            router=forward_flops(partial(ensemble.router.logits, row, t, null)) if ensemble.router else 0.0,
        )

    def times(self, calls: Calls) -> float:
        """Floating point operations of these calls."""
        experts = sum(self.experts[k] * count for k, count in calls.experts.items())
        return experts + self.router * calls.router


def _identity(folder: Path, seeds: Sequence[int], class_ids: Sequence[int] | None, sampling: SamplingConfig) -> str:
    """What the images depend on, as 16 hex digits."""
    files = {str(path.relative_to(folder)): checksum(path) for path in files_in(folder)}
    return fingerprint("images", [list(seeds), class_ids, sampling], files)[:16]


def _write(file: Path, drawn: Samples) -> None:
    experts = drawn.calls.experts
    arrays = {
        "images": to_bytes(drawn.images),
        "expert_ids": np.array(sorted(experts), np.int64),
        "expert_calls": np.array([experts[k] for k in sorted(experts)], np.int64),
        "router_calls": np.array([drawn.calls.router], np.int64),
        "evaluations": np.array([drawn.calls.evaluations], np.int64),
    }
    temporary = file.with_name(f".{file.name}")
    save_arrays(temporary, arrays)
    temporary.replace(file)


def _calls_of(found: dict[str, np.ndarray]) -> Calls:
    pairs = zip(found["expert_ids"].tolist(), found["expert_calls"].tolist(), strict=True)
    router, evaluations = int(found["router_calls"][0]), int(found["evaluations"][0])
    return Calls(experts=Counter(dict(pairs)), router=router, evaluations=evaluations)
