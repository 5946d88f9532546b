"""A compressed ensemble beside the one it was made from: bytes, and samples from the same noise."""

from dataclasses import dataclass
from pathlib import Path

import torch

from artifacts import Workspace, files_in
from ensemble.config import SamplingConfig
from ensemble.draws import RowFlops
from ensemble.pipeline import DDMPipeline
from ensemble.sample import sample


class StageError(ValueError):
    """A stage cannot do what it was asked to do with this ensemble."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What a stage did; written as `compression.json`."""

    stage: str
    modules: int
    """Weights, layers or whatever the stage works on, that it has changed."""
    bytes_before: int
    """Of experts and router on disk; the codec is the same on both sides."""
    bytes_after: int
    relative_l2: float
    """|| images - images of the whole ensemble || / || images of the whole ensemble ||, same noise."""
    num_samples: int


def model_bytes(folder: Path) -> int:
    """Bytes of all files of a pipeline's experts and router."""
    parts = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name not in ("codec", "scheduler")]
    return sum(file.stat().st_size for part in parts for file in files_in(part))


def compare(
    stage: str, modules: int, before: Path, after: Path, sampling: SamplingConfig, count: int, workspace: Workspace
) -> tuple[Comparison, float]:
    """Bytes and relative L2 distance, and the FLOPs of drawing."""
    images, flops = [], 0.0
    for number, folder in enumerate((before, after)):
        workspace.report(number * count, 2 * count, unit="images")
        pipeline = DDMPipeline.from_pretrained(folder)
        drawn = sample(pipeline.ensemble, pipeline.codec, list(range(count)), sampling)
        images.append(drawn.images.double())
        flops += RowFlops.of(pipeline).times(drawn.calls)
    distance = torch.linalg.vector_norm(images[1] - images[0]) / torch.linalg.vector_norm(images[0])
    found = Comparison(
        stage=stage,
        modules=modules,
        bytes_before=model_bytes(before),
        bytes_after=model_bytes(after),
        relative_l2=float(distance),
        num_samples=count,
    )
    return found, flops
