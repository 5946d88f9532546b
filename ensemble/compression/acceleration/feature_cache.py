"""Feature caching: give each expert a schedule of which modules are computed at which step, and count its FLOPs.

    output(t) = f(t) at compute steps, else a Taylor series of `order` around the last of them (0: its output)

DeepCache (Ma et al. 2024, arXiv:2312.00858), TaylorSeer (Liu et al. 2025, arXiv:2503.06923) and block-wise adaptive
caching (2025, arXiv:2506.13456); with a `level` also A-SDM's feature inheritance (Zhu et al. 2024,
arXiv:2406.00210). Networks are not changed. Adaptive schedules depend on features along the expert's own
trajectories, so each expert can have its own, or all share the schedule of their mean.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from ddm_core.artifacts import Preempted, Workspace
from ensemble.compression.acceleration.adaptive_schedule import (
    Similarity,
    bubbling_union,
    cosine_similarity,
    optimal_compute_steps,
    output_variation,
)
from ensemble.compression.acceleration.cacheable_modules import ATTENTION, cacheable_modules, uniform_compute_steps
from ensemble.compression.acceleration.config import CacheConfig
from ensemble.compression.common.calibration_data import record_calls
from ensemble.compression.common.network_stages import image_features
from ensemble.compression.method import CompressionContext, EnsembleResult, StageError
from ensemble.config import SamplingConfig
from ensemble.solvers import euler_step, make_noise, uniform_times
from experts.compressed.caching.feature_cache import CachedOutputs, skip_cached_modules
from experts.compressed.caching.plan import CacheSchedule
from experts.compressed.pruning.structure import Structure
from experts.conditions.condition import Condition
from experts.expert import Expert
from experts.networks.registry import call_network
from experts.training.flops import forward_flops

MIN_SAVED_SHARE = 0.01
"""A cache that saves a smaller share of the FLOPs is an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedModules:
    """Statistics of an expert's modules along its own trajectories."""

    similarities: Mapping[str, Similarity]
    changes: Mapping[str, float]


def cache_all(config: CacheConfig, context: CompressionContext) -> EnsembleResult:
    """Run `cache_experts` on all experts of an ensemble."""
    return cache_experts(context.load_single_networks("cache"), config, context.sampling, context.workspace)


def cache_experts(
    experts: Mapping[int, Expert], config: CacheConfig, sampling: SamplingConfig, workspace: Workspace
) -> EnsembleResult:
    """Give every expert a cache schedule for these sampling settings.

    Raises `StageError` for a few-step expert, or if the schedule saves less than 1 % of the FLOPs.
    """
    times = tuple(uniform_times(sampling.steps, next(iter(experts.values())).t_shift)[:-1].tolist())
    for k, expert in experts.items():
        if expert.few_step is not None:
            raise StageError(
                f"expert {k} has only {len(expert.few_step.times)} steps, whose features differ too much to be reused; "
                "cache an ensemble that was not distilled"
            )
    is_adaptive = config.policy in ("adaptive", "unified")
    observed = (
        {k: observe_modules(expert, config, times, workspace) for k, expert in experts.items()} if is_adaptive else {}
    )
    if is_adaptive and not config.route_aware:
        observed = dict.fromkeys(experts, _mean(list(observed.values())))
    cached, details = {}, {}
    for k, expert in experts.items():
        steps = choose_steps(expert.model, config, len(times), observed.get(k))
        schedule = CacheSchedule(
            times=times,
            compute_steps=steps,
            order=config.order,
            relative_flops=_relative_flops(expert, steps, len(times)),
        )
        share = sum(schedule.relative_flops) / len(times)
        if config.interval > 1 and share > 1 - MIN_SAVED_SHARE:
            raise StageError(
                f"a cache must save 1 % of the FLOPs, and expert {k} would keep {share:.1%} of them; raise "
                "accelerate.interval, lower accelerate.bubbling, or cache more modules"
            )
        cached[k] = replace(expert, cache=schedule)
        details[str(k)] = {
            "flops": share,
            "compute_steps": {path: list(steps) for path, steps in schedule.compute_steps.items()},
        }
    flops = sum(row_flops(expert) * config.rows * len(times) for expert in experts.values()) if is_adaptive else 0.0
    return EnsembleResult(
        experts=cached,
        modules=sum(len(expert.cache.compute_steps) for expert in cached.values() if expert.cache),
        flops=flops,
        details=details,
    )


def refit_cache(expert: Expert, before: Expert) -> Expert:
    """Adapt the cache schedule of an expert whose network may have lost layers, and count its FLOPs again.

    Raises `StageError` for a hook of diffusers, which was calibrated on the network before.
    """
    if expert.cache is None or Structure.from_model(expert.model) == Structure.from_model(before.model):
        return expert
    if expert.cache.hook is not None:
        raise StageError(
            "diffusers' hooks are calibrated on the unpruned network; set accelerate=cache, which adapts to pruning"
        )
    paths = {path for path, _ in expert.model.named_modules()}
    steps = {path: steps for path, steps in expert.cache.compute_steps.items() if path in paths}
    flops = _relative_flops(expert, steps, len(expert.cache.times))
    return replace(expert, cache=replace(expert.cache, compute_steps=steps, relative_flops=flops))


def choose_steps(
    model: nn.Module, config: CacheConfig, steps: int, observed: ObservedModules | None
) -> dict[str, tuple[int, ...]]:
    """Return the steps at which each cached module is computed."""
    paths = cacheable_modules(model, config)
    if observed is None:
        return dict.fromkeys(paths, uniform_compute_steps(config, steps))
    count = max(1, round(steps / config.interval))
    if config.policy == "unified":
        return dict.fromkeys(paths, optimal_compute_steps(observed.similarities[paths[0]], count))
    optimal = {path: optimal_compute_steps(observed.similarities[path], count) for path in paths}
    feed_forward = [path for path in paths if not ATTENTION.search(path)]
    return bubbling_union(optimal, observed.changes, config.bubbling, feed_forward)


def observe_modules(
    expert: Expert, config: CacheConfig, times: tuple[float, ...], workspace: Workspace
) -> ObservedModules:
    """Compare the outputs of an expert's modules along Euler trajectories from seeded noise; raise `Preempted`."""
    paths = cacheable_modules(expert.model, config)
    outputs: dict[str, list[Tensor]] = {path: [] for path in paths}
    noised = make_noise(range(config.seed, config.seed + config.rows), expert.latent_shape)
    condition = Condition.null(config.rows)

    def record(path: str, _: Tensor, output: Tensor) -> None:
        outputs[path].append(image_features(expert.model.get_submodule(path), output).flatten(1))

    with (
        torch.no_grad(),
        record_calls(expert.model, paths, record),
    ):
        for t, t_next in pairwise([*times, 0.0]):
            if workspace.stop_requested():
                raise Preempted("stopped while features were recorded; recording restarts")
            noised = euler_step(lambda latents, now: expert.velocity(latents, now, condition), noised, t, t_next)
    stacked = {path: torch.stack(steps) for path, steps in outputs.items()}
    return ObservedModules(
        similarities={path: cosine_similarity(steps) for path, steps in stacked.items()},
        changes={path: output_variation(steps) for path, steps in stacked.items()},
    )


def _mean(observed: list[ObservedModules]) -> ObservedModules:
    """Return the mean over experts, for a schedule that all share."""
    first = observed[0]
    return ObservedModules(
        similarities={
            path: np.mean([expert.similarities[path] for expert in observed], axis=0) for path in first.similarities
        },
        changes={path: float(np.mean([expert.changes[path] for expert in observed])) for path in first.changes},
    )


def _relative_flops(expert: Expert, compute_steps: Mapping[str, tuple[int, ...]], steps: int) -> tuple[float, ...]:
    """Count the FLOPs of every step, relative to a step without cache; equal sets of modules are counted once."""
    full_step, counted = row_flops(expert), dict[frozenset[str], float]()
    shares = []
    for index in range(steps):
        computed = frozenset(path for path, when in compute_steps.items() if index in when)
        if computed not in counted:
            counted[computed] = _count_flops(expert, compute_steps, computed) / full_step
        shares.append(min(1.0, counted[computed]))
    return tuple(shares)


def _count_flops(expert: Expert, paths: Iterable[str], computed: frozenset[str]) -> float:
    """Count the FLOPs of one row when only the modules in `computed` are computed and the others are cached."""
    schedule = CacheSchedule(
        times=(1.0, 0.5),
        compute_steps={path: (1,) if path in computed else () for path in paths},
        relative_flops=(1.0, 1.0),
    )
    cache = CachedOutputs()
    with skip_cached_modules(expert.model, schedule, 0, cache):
        _run_row(expert)
    with skip_cached_modules(expert.model, schedule, 1, cache):
        return forward_flops(lambda: _run_row(expert))


def row_flops(expert: Expert) -> float:
    """Return the FLOPs of the network on one row."""
    return forward_flops(lambda: _run_row(expert))


def _run_row(expert: Expert) -> Tensor:
    row, t = torch.zeros(1, *expert.latent_shape), torch.full((1,), 0.5)
    with torch.no_grad():
        return call_network(expert.model, row, t, Condition.null(1))
