"""How much processor time an image takes, against the whole ensemble's: both in turns, in one process, on one thread.

Seconds depend on the machine and on who else is on it; the ratio of two figures that were taken in turns hardly does.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ddm_core.artifacts import Preempted, Workspace, files_in, read_json, write_json
from ensemble.compression.config import TimingConfig
from ensemble.config import SamplingConfig
from ensemble.evaluation.generate import RowFlops
from ensemble.pipeline import DDMPipeline
from ensemble.sampling.sample import sample

REPORT_FILE = "compression.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionReport:
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
    def read(cls, path: Path) -> "CompressionReport":
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
) -> CompressionReport:
    """Draw the same `count` images from both."""
    images, flops = [], []
    for number, folder in enumerate((whole, smaller)):
        workspace.report_progress(number * count, 2 * count, unit="images")
        pipeline = DDMPipeline.from_pretrained(folder)
        costs = RowFlops.of(pipeline)
        drawn = sample(pipeline.ensemble, pipeline.codec, list(range(count)), sampling)
        images.append(drawn.images.double())
        flops.append(costs.times(drawn.calls) / count)
    distance = torch.linalg.vector_norm(images[1] - images[0]) / torch.linalg.vector_norm(images[0])
    return CompressionReport(
        stages=stages,
        modules=modules,
        bytes_before=model_bytes(whole),
        bytes_after=model_bytes(smaller),
        flops_before=flops[0],
        flops_after=flops[1],
        relative_l2=float(distance),
        num_samples=count,
    )


def describe(found: CompressionReport) -> str:
    """One line for a terminal."""
    share, work = found.bytes_after / found.bytes_before, found.flops_after / found.flops_before
    return (
        f"{' + '.join(found.stages)}: {found.modules} changed, {found.bytes_before:,} to {found.bytes_after:,} bytes "
        f"({share:.2f} x), {work:.2f} x the FLOPs of an image, relative L2 {found.relative_l2:.4f} on "
        f"{found.num_samples} images"
    )


TIMING_FILE = "timing.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Processor time, measured on this machine; written as `timing.json`."""

    seconds_before: float
    """Processor seconds an image of the whole ensemble takes: the lower quartile of the turns."""
    seconds_after: float
    ratio: float
    """`seconds_after / seconds_before`."""
    lowest: float
    """Of the ratios of single turns."""
    highest: float
    turns: int
    threads: int = 1


LEAST = 0.25
"""Of the FLOPs of the other pipeline: what is quicker draws its images so often in a turn that it too takes a while."""


def time_both(config: TimingConfig, smaller: Path, whole: Path, out: Path, workspace: Workspace) -> float:
    """Write `timing.json`, and return the FLOPs of drawing."""
    pipelines = [DDMPipeline.from_pretrained(folder) for folder in (whole, smaller)]
    seeds = list(range(config.num_images))
    seconds: tuple[list[float], list[float]] = ([], [])
    with one_thread():
        warm = [sample(one.ensemble, one.codec, seeds, config.sampling).calls for one in pipelines]
        flops = [RowFlops.of(one).times(calls) for one, calls in zip(pipelines, warm, strict=True)]
        draws = [max(1, round(LEAST * max(flops) / own)) for own in flops]
        for turn in range(config.turns):
            workspace.report_progress(turn, config.turns, unit="turns")
            if workspace.stop_requested():
                raise Preempted(f"stopped after {turn} turns; a measurement starts again")
            for one, count, found in zip(pipelines, draws, seconds, strict=True):
                start = time.process_time()
                for _ in range(count):
                    sample(one.ensemble, one.codec, seeds, config.sampling)
                found.append((time.process_time() - start) / count / len(seeds))
    before, after = (statistics.quantiles(found, n=4)[0] for found in seconds)
    ratios = [ours / theirs for theirs, ours in zip(*seconds, strict=True)]
    timing = Timing(
        seconds_before=before,
        seconds_after=after,
        ratio=after / before,
        lowest=min(ratios),
        highest=max(ratios),
        turns=config.turns,
    )
    write_json(out / TIMING_FILE, timing)
    return sum(own * (1 + count * config.turns) for own, count in zip(flops, draws, strict=True))


@contextmanager
def one_thread() -> Iterator[None]:
    """As many threads as before afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
