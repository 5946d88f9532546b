"""Measure a compressed ensemble against the original: bytes, FLOPs, memory, distance of samples, processor time.

Both are measured as they are served: the conditions of the data, the run's guidance and solver, and requests of
several sizes. Calls that differ in their number of rows differ in cost, so the calls of real requests are counted.

Both are timed alternately, in one process, on one thread. Seconds depend on the machine and its load; the ratio of two
alternating measurements hardly does.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ddm_core.artifacts import Preempted, Workspace, list_files, write_json
from ensemble.compression.config import CompressionConfig, TimingConfig
from ensemble.compression.method import Clusters
from ensemble.compression.report import TIMING_FILE, CompressionReport, ServedCost
from ensemble.config import SamplingConfig
from ensemble.ensemble import Ensemble
from ensemble.pipeline import EnsemblePipeline
from ensemble.sampling.sample import sample
from experts.compressed.quantization.shared_weight_io import collect_bases
from experts.conditions.condition import NULL_CLASS, Condition
from experts.expert import EARLY
from experts.training.flops import flop_counter
from experts.training.memory import LiveBytes
from experts.types import Latents
from router.router import Router

RECORDS = ("outcome.json", "training.json", "quality.json", "metrics.jsonl", "distilled_monolith.json")
"""Files in a pipeline's folder that record how it was made; nothing is loaded from them."""


def model_bytes(folder: Path) -> int:
    """Return the bytes of all files that a pipeline's experts and router are loaded from."""
    parts = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name not in ("codec", "scheduler")]
    files = (file.relative_to(folder) for part in parts for file in list_files(part))
    return sum((folder / file).stat().st_size for file in files if file.name not in RECORDS and EARLY not in file.parts)


def load_served_condition(
    data: Clusters, pipeline: EnsemblePipeline, count: int, workspace: Workspace
) -> Condition | None:
    """Return the conditions of `count` samples of all clusters, as users request them (a caption, else a class).

    None for experts that read neither.
    """
    if not data.labeled or not (pipeline.num_classes or pipeline.text):
        return None
    latents = data.load_all_latents(workspace)
    order = torch.randperm(len(latents), generator=torch.Generator().manual_seed(0))
    condition = latents.condition(order.repeat(-(-count // len(order)))[:count])
    return replace(condition, class_id=condition.class_id.masked_fill(~condition.has_null_text, NULL_CLASS))


class _Server:
    """A pipeline that answers requests, whose FLOPs and memory it counts."""

    def __init__(self, folder: Path, sampling: SamplingConfig) -> None:
        self.pipeline = EnsemblePipeline.from_pretrained(folder)
        self.sampling = replace(sampling, compile=False)
        self._memory = LiveBytes(_network_tensors(self.pipeline.ensemble))

    def request(self, condition: Condition | None, count: int) -> tuple[Latents, float, int]:
        """Return `count` latents sampled as one request, the FLOPs of all its calls, and the peak bytes of tensors."""
        given = None if condition is None else condition.rows(slice(count))
        ensemble, codec = self.pipeline.ensemble, self.pipeline.codec
        self._memory.peak, flops = self._memory.live, flop_counter()
        with torch.inference_mode(), self._memory, flops:
            latents = sample(ensemble, codec, range(count), self.sampling, given, decode=False).latents
            return latents, float(flops.get_total_flops()), self._memory.peak


def _network_tensors(ensemble: Ensemble) -> Iterator[Tensor]:
    """Yield parameters and buffers of experts and router."""
    models = [model for expert in ensemble.experts.values() for model in expert.networks()]
    routers = [ensemble.router.model] if isinstance(ensemble.router, Router) else []
    for model in (*models, *routers, *(base.parts for base in collect_bases(models).values())):
        yield from (*model.parameters(), *model.buffers())


def compare(
    stages: tuple[str, ...],
    modules: int,
    folders: tuple[Path, Path],
    data: Clusters,
    config: CompressionConfig,
    workspace: Workspace,
) -> CompressionReport:
    """Compare images of the original and the compressed ensemble in `folders`, as they are served.

    Both sample the same conditions from the same noise, in one request of each of the configuration's sizes.
    """
    sizes = sorted({min(size, config.num_samples) for size in (*config.batch_sizes, config.num_samples)})
    images, costs, condition = [], [], None
    for number, folder in enumerate(folders):
        server = _Server(folder, config.sampling)
        condition = condition or load_served_condition(data, server.pipeline, config.num_samples, workspace)
        for size in sizes:
            workspace.report_progress(number * sum(sizes) + size, 2 * sum(sizes), unit="images")
            latents, flops, memory = server.request(condition, size)
            costs.append((flops / size, memory))
        images.append(server.pipeline.codec.decode(latents).double())
    distance = torch.linalg.vector_norm(images[1] - images[0]) / torch.linalg.vector_norm(images[0])
    served = tuple(
        ServedCost(
            batch_size=size,
            flops_before=before[0],
            flops_after=after[0],
            memory_before=before[1],
            memory_after=after[1],
        )
        for size, before, after in zip(sizes, costs[: len(sizes)], costs[len(sizes) :], strict=True)
    )
    return CompressionReport(
        stages=stages,
        modules=modules,
        bytes_before=model_bytes(folders[0]),
        bytes_after=model_bytes(folders[1]),
        flops_before=served[-1].flops_before,
        flops_after=served[-1].flops_after,
        relative_l2=float(distance),
        num_samples=config.num_samples,
        guidance_scale=1.0 if condition is None else config.sampling.guidance_scale,
        served=served,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedRequest:
    """Processor time of one size of request."""

    batch_size: int
    seconds_before: float
    """Processor seconds per image of the original ensemble: the lower quartile over the rounds."""
    seconds_after: float
    ratio: float
    """`seconds_after / seconds_before`."""
    lowest: float
    """Lowest ratio of a single round."""
    highest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Processor time of both ensembles on this machine; written as `timing.json`."""

    ratio: float
    """Of the largest request."""
    served: tuple[TimedRequest, ...]
    """By the size of the request, the smallest first."""
    turns: int
    threads: int = 1


MIN_FLOPS_SHARE = 0.25
"""The faster pipeline repeats its images in a round until it has this share of the other's FLOPs, for a stable time."""


def time_both(
    config: TimingConfig, compressed: Path, original: Path, data: Clusters, out: Path, workspace: Workspace
) -> float:
    """Time requests to both ensembles, write `timing.json`, and return the FLOPs of sampling."""
    servers = [_Server(folder, config.sampling) for folder in (original, compressed)]
    sizes = sorted(config.batch_sizes)
    condition = load_served_condition(data, servers[0].pipeline, sizes[-1], workspace)
    served, flops = [], 0.0
    with use_one_thread():
        for number, size in enumerate(sizes):
            workspace.report_progress(number, len(sizes), unit="batch sizes")
            timed, cost = _time_request(servers, condition, size, config, workspace)
            served.append(timed)
            flops += cost
    write_json(out / TIMING_FILE, Timing(ratio=served[-1].ratio, served=tuple(served), turns=config.turns))
    return flops


def _time_request(
    servers: Sequence[_Server],
    condition: Condition | None,
    size: int,
    config: TimingConfig,
    workspace: Workspace,
) -> tuple[TimedRequest, float]:
    """Time requests of one size alternately; return the time and the FLOPs of all of them."""
    given = None if condition is None else condition.rows(slice(size))
    seconds: tuple[list[float], list[float]] = ([], [])
    # The counted requests also warm up both pipelines.
    flops, pipelines = [server.request(condition, size)[1] for server in servers], [one.pipeline for one in servers]
    if config.sampling.compile:
        for pipeline in pipelines:
            sample(pipeline.ensemble, pipeline.codec, range(size), config.sampling, given)
    repeats = [max(1, round(MIN_FLOPS_SHARE * max(flops) / value)) for value in flops]
    for number in range(config.turns):
        if workspace.stop_requested():
            raise Preempted(f"stopped after {number} rounds; timing restarts from the first")
        for pipeline, count, times in zip(pipelines, repeats, seconds, strict=True):
            start = time.process_time()
            for _ in range(count):
                sample(pipeline.ensemble, pipeline.codec, range(size), config.sampling, given)
            times.append((time.process_time() - start) / count / size)
    before, after = (statistics.quantiles(times, n=4)[0] for times in seconds)
    ratios = [compressed_s / original_s for original_s, compressed_s in zip(*seconds, strict=True)]
    timed = TimedRequest(
        batch_size=size,
        seconds_before=before,
        seconds_after=after,
        ratio=after / before,
        lowest=min(ratios),
        highest=max(ratios),
    )
    return timed, sum(value * (1 + count * config.turns) for value, count in zip(flops, repeats, strict=True))


@contextmanager
def use_one_thread() -> Iterator[None]:
    """Limit torch to one thread within the context, and restore the number afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
