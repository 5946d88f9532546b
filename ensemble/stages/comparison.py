"""A compressed ensemble beside the whole one: bytes, FLOPs, and samples from the same noise."""

from dataclasses import dataclass
from pathlib import Path

import torch

from artifacts import Workspace, files_in, read_json
from ensemble.config import SamplingConfig
from ensemble.draws import RowFlops
from ensemble.pipeline import DDMPipeline
from ensemble.sample import sample

COMPRESSION = "compression.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What the stages up to this one did to the whole ensemble; written as `compression.json`."""

    stages: tuple[str, ...]
    """The methods so far, in their order."""
    modules: int
    """Weights, layers or whatever the last stage works on, that it has changed."""
    bytes_before: int
    """Of the whole ensemble's experts and router on disk; the codec is the same on both sides."""
    bytes_after: int
    flops_before: float
    """Of an image from the whole ensemble, on average."""
    flops_after: float
    relative_l2: float
    """|| images - images of the whole ensemble || / || images of the whole ensemble ||, same noise."""
    num_samples: int

    @classmethod
    def read(cls, path: Path) -> "Comparison":
        """What was written as JSON."""
        found = read_json(path)
        return cls(**found | {"stages": tuple(found["stages"])})


def model_bytes(folder: Path) -> int:
    """Bytes of all files of a pipeline's experts and router."""
    parts = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name not in ("codec", "scheduler")]
    return sum(file.stat().st_size for part in parts for file in files_in(part))


def compare(
    stages: tuple[str, ...],
    modules: int,
    whole: Path,
    smaller: Path,
    sampling: SamplingConfig,
    count: int,
    workspace: Workspace,
) -> Comparison:
    """Draw the same `count` images from both."""
    images, flops = [], []
    for number, folder in enumerate((whole, smaller)):
        workspace.report(number * count, 2 * count, unit="images")
        pipeline = DDMPipeline.from_pretrained(folder)
        costs = RowFlops.of(pipeline)
        drawn = sample(pipeline.ensemble, pipeline.codec, list(range(count)), sampling)
        images.append(drawn.images.double())
        flops.append(costs.times(drawn.calls) / count)
    distance = torch.linalg.vector_norm(images[1] - images[0]) / torch.linalg.vector_norm(images[0])
    return Comparison(
        stages=stages,
        modules=modules,
        bytes_before=model_bytes(whole),
        bytes_after=model_bytes(smaller),
        flops_before=flops[0],
        flops_after=flops[1],
        relative_l2=float(distance),
        num_samples=count,
    )


def describe(found: Comparison) -> str:
    """One line for a terminal."""
    share, work = found.bytes_after / found.bytes_before, found.flops_after / found.flops_before
    return (
        f"{' + '.join(found.stages)}: {found.modules} changed, {found.bytes_before:,} to {found.bytes_after:,} bytes "
        f"({share:.2f} x), {work:.2f} x the FLOPs of an image, relative L2 {found.relative_l2:.4f} on "
        f"{found.num_samples} images"
    )
