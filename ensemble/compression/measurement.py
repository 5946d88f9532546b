"""Measure a compressed ensemble against the original: bytes, FLOPs, distance of samples, and processor time per image.

Both are timed alternately, in one process, on one thread. Seconds depend on the machine and its load; the ratio of two
alternating measurements hardly does.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ddm_core.artifacts import Preempted, Workspace, list_files, write_json
from ensemble.compression.config import TimingConfig
from ensemble.compression.report import TIMING_FILE, CompressionReport
from ensemble.config import SamplingConfig
from ensemble.evaluation.generate import RowFlops
from ensemble.pipeline import EnsemblePipeline
from ensemble.sampling.sample import sample

RECORDS = ("outcome.json", "training.json", "quality.json", "metrics.jsonl", "distilled_monolith.json")
"""Files in a pipeline's folder that record how it was made; nothing is loaded from them."""


def model_bytes(folder: Path) -> int:
    """Return the bytes of all files that a pipeline's experts and router are loaded from."""
    parts = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name not in ("codec", "scheduler")]
    return sum(file.stat().st_size for part in parts for file in list_files(part) if file.name not in RECORDS)


def compare(
    stages: tuple[str, ...],
    modules: int,
    original: Path,
    compressed: Path,
    sampling: SamplingConfig,
    count: int,
    workspace: Workspace,
) -> CompressionReport:
    """Compare `count` images of both ensembles, sampled from the same noise."""
    images, flops = [], []
    for number, folder in enumerate((original, compressed)):
        workspace.report_progress(number * count, 2 * count, unit="images")
        pipeline = EnsemblePipeline.from_pretrained(folder)
        costs = RowFlops.measure(pipeline)
        samples = sample(pipeline.ensemble, pipeline.codec, list(range(count)), sampling)
        images.append(samples.images.double())
        flops.append(costs.times(samples.calls) / count)
    distance = torch.linalg.vector_norm(images[1] - images[0]) / torch.linalg.vector_norm(images[0])
    return CompressionReport(
        stages=stages,
        modules=modules,
        bytes_before=model_bytes(original),
        bytes_after=model_bytes(compressed),
        flops_before=flops[0],
        flops_after=flops[1],
        relative_l2=float(distance),
        num_samples=count,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Processor time of both ensembles on this machine; written as `timing.json`."""

    seconds_before: float
    """Processor seconds per image of the original ensemble: the lower quartile over the rounds."""
    seconds_after: float
    ratio: float
    """`seconds_after / seconds_before`."""
    lowest: float
    """Lowest ratio of a single round."""
    highest: float
    turns: int
    threads: int = 1


MIN_FLOPS_SHARE = 0.25
"""The faster pipeline repeats its images in a round until it has this share of the other's FLOPs, for a stable time."""


def time_both(config: TimingConfig, compressed: Path, original: Path, out: Path, workspace: Workspace) -> float:
    """Time both ensembles, write `timing.json`, and return the FLOPs of sampling."""
    pipelines = [EnsemblePipeline.from_pretrained(folder) for folder in (original, compressed)]
    seeds = list(range(config.num_images))
    seconds: tuple[list[float], list[float]] = ([], [])
    with use_one_thread():
        # The first samples also warm up both pipelines.
        calls = [sample(pipeline.ensemble, pipeline.codec, seeds, config.sampling).calls for pipeline in pipelines]
        flops = [RowFlops.measure(pipeline).times(count) for pipeline, count in zip(pipelines, calls, strict=True)]
        repeats = [max(1, round(MIN_FLOPS_SHARE * max(flops) / value)) for value in flops]
        for number in range(config.turns):
            workspace.report_progress(number, config.turns, unit="rounds")
            if workspace.stop_requested():
                raise Preempted(f"stopped after {number} rounds; timing restarts from the first")
            for pipeline, count, times in zip(pipelines, repeats, seconds, strict=True):
                start = time.process_time()
                for _ in range(count):
                    sample(pipeline.ensemble, pipeline.codec, seeds, config.sampling)
                times.append((time.process_time() - start) / count / len(seeds))
    before, after = (statistics.quantiles(times, n=4)[0] for times in seconds)
    ratios = [compressed_s / original_s for original_s, compressed_s in zip(*seconds, strict=True)]
    timing = Timing(
        seconds_before=before,
        seconds_after=after,
        ratio=after / before,
        lowest=min(ratios),
        highest=max(ratios),
        turns=config.turns,
    )
    write_json(out / TIMING_FILE, timing)
    return sum(value * (1 + count * config.turns) for value, count in zip(flops, repeats, strict=True))


@contextmanager
def use_one_thread() -> Iterator[None]:
    """Limit torch to one thread within the context, and restore the number afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
