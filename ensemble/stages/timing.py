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

from artifacts import Preempted, Workspace, write_json
from ensemble.draws import RowFlops
from ensemble.pipeline import DDMPipeline
from ensemble.sample import sample
from ensemble.stages.config import TimingConfig

TIMING = "timing.json"


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
            workspace.report(turn, config.turns, unit="turns")
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
    write_json(out / TIMING, timing)
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
