"""Caches for an ensemble: for each expert a plan of what is computed when, and what that costs.

Nothing of a network changes. Schedules that look at features look at those of the expert's own trajectories, so each
expert has its own, unless one is asked for that suits all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddm_core.artifacts import Preempted, Workspace
from ensemble.compression.acceleration.adaptive_schedule import (
    Similarity,
    bubbling_union,
    optimal_compute_steps,
    output_variation,
    similarity,
)
from ensemble.compression.acceleration.cacheable_modules import FEED_FORWARD, cacheable_modules, uniform_compute_steps
from ensemble.compression.acceleration.config import CacheConfig
from ensemble.compression.common.calibration_data import record_inputs
from ensemble.compression.method import CompressionContext, EnsembleResult, StageError
from ensemble.config import SamplingConfig
from ensemble.solvers import euler_step, noise_for, uniform_times
from experts.compressed.caching.feature_cache import CachedOutputs, skip_cached_modules
from experts.compressed.caching.plan import CacheSchedule
from experts.compressed.pruning.structure import Structure
from experts.condition import Condition
from experts.expert import Expert
from experts.networks.registry import call_network
from experts.training.flops import forward_flops

LEAST_SAVED = 0.01
"""A cache that saves a smaller share of the FLOPs is a mistake."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedModules:
    """What an expert's own trajectories show of its modules."""

    similarities: Mapping[str, Similarity]
    changes: Mapping[str, float]


def cache_all(config: CacheConfig, given: CompressionContext) -> EnsembleResult:
    """Every expert of an ensemble with a plan; raises what `cached` raises."""
    return cache_expert(given.experts("cache"), config, given.sampling, given.workspace)


def cache_expert(
    experts: Mapping[int, Expert], config: CacheConfig, sampling: SamplingConfig, workspace: Workspace
) -> EnsembleResult:
    """Every expert with a plan for this way of sampling.

    Raises `StageError` for an expert that is asked at few t, or if hardly anything would be saved.
    """
    times = tuple(uniform_times(sampling.steps)[:-1].tolist())
    for k, expert in experts.items():
        if expert.few_step is not None:
            raise StageError(
                f"expert {k} has a course of {len(expert.few_step.times)} steps, between which hardly anything stays the "
                "same; cache an ensemble that was not distilled"
            )
    looks = config.policy in ("adaptive", "unified")
    seen = {k: _observe(expert, config, times, workspace) for k, expert in experts.items()} if looks else {}
    if looks and not config.route_aware:
        seen = dict.fromkeys(experts, _mean(list(seen.values())))
    made, details = {}, {}
    for k, expert in experts.items():
        updates = _updates(expert.model, config, len(times), seen.get(k))
        plan = CacheSchedule(
            times=times, compute_steps=updates, order=config.order, relative_flops=_costs(expert, updates, len(times))
        )
        if config.interval > 1 and sum(plan.relative_flops) > (1 - LEAST_SAVED) * len(times):
            raise StageError(
                f"expert {k} would have {sum(plan.relative_flops) / len(times):.1%} of its FLOPs; keep more of it"
            )
        made[k] = replace(expert, cache=plan)
        details[str(k)] = {
            "flops": sum(plan.relative_flops) / len(times),
            "compute_steps": plan.described()["compute_steps"],
        }
    flops = sum(network_rows(expert) * config.rows * len(times) for expert in experts.values()) if looks else 0.0
    return EnsembleResult(
        experts=made,
        modules=sum(len(one.cache.compute_steps) for one in made.values() if one.cache),
        flops=flops,
        details=details,
    )


def refit_cache(expert: Expert, before: Expert) -> Expert:
    """An expert whose network may have lost layers since its plan was made: what is left of it, at its own costs.

    Raises `StageError` if the plan is a hook of diffusers, which was tried on the network as it was.
    """
    if expert.cache is None or Structure.of(expert.model) == Structure.of(before.model):
        return expert
    if expert.cache.hook is not None:
        raise StageError(
            "diffusers' hooks are tried on whole networks; take accelerate=cache, which can be pruned behind"
        )
    known = {path for path, _ in expert.model.named_modules()}
    updates = {path: steps for path, steps in expert.cache.compute_steps.items() if path in known}
    plan = replace(expert.cache, compute_steps=updates, relative_flops=_costs(expert, updates, len(expert.cache.times)))
    return replace(expert, cache=plan)


def _updates(
    model: nn.Module, config: CacheConfig, steps: int, seen: ObservedModules | None
) -> dict[str, tuple[int, ...]]:
    paths = cacheable_modules(model, config)
    if seen is None:
        return dict.fromkeys(paths, uniform_compute_steps(config, steps))
    count = max(1, round(steps / config.interval))
    if config.policy == "unified":
        return dict.fromkeys(paths, optimal_compute_steps(seen.similarities[paths[0]], count))
    own = {path: optimal_compute_steps(seen.similarities[path], count) for path in paths}
    behind = [path for path in paths if FEED_FORWARD.fullmatch(path)]
    return bubbling_union(own, seen.changes, config.bubbling, behind)


def _observe(expert: Expert, config: CacheConfig, times: tuple[float, ...], workspace: Workspace) -> ObservedModules:
    """What its modules say along Euler's trajectories from seeded noise."""
    paths = cacheable_modules(expert.model, config)
    said: dict[str, list[Tensor]] = {path: [] for path in paths}
    noised = noise_for(range(config.seed, config.seed + config.rows), expert.latent_shape)
    condition = Condition.null(config.rows)
    with torch.no_grad(), record_inputs(expert.model, paths, lambda path, _, found: said[path].append(_flat(found))):
        for t, t_next in pairwise([*times, 0.0]):
            if workspace.stop_requested():
                raise Preempted("stopped while features were looked at; they are looked at again")
            noised = euler_step(lambda at, now: expert.velocity(at, now, condition), noised, t, t_next)
    stacked = {path: torch.stack(found) for path, found in said.items()}
    return ObservedModules(
        similarities={path: similarity(found) for path, found in stacked.items()},
        changes={path: output_variation(found) for path, found in stacked.items()},
    )


def _flat(found: Tensor | tuple[Any, ...]) -> Tensor:
    return (found if isinstance(found, Tensor) else found[0]).flatten(1)


def _mean(seen: list[ObservedModules]) -> ObservedModules:
    return ObservedModules(
        similarities={path: np.mean([one.similarities[path] for one in seen], axis=0) for path in seen[0].similarities},
        changes={path: float(np.mean([one.changes[path] for one in seen])) for path in seen[0].changes},
    )


def _costs(expert: Expert, updates: Mapping[str, tuple[int, ...]], steps: int) -> tuple[float, ...]:
    """FLOPs of every step over a full one's, counted."""
    whole, found = network_rows(expert), dict[frozenset[str], float]()
    costs = []
    for index in range(steps):
        due = frozenset(path for path, when in updates.items() if index in when)
        if due not in found:
            found[due] = _flops(expert, updates, due) / whole
        costs.append(min(1.0, found[due]))
    return tuple(costs)


def _flops(expert: Expert, updates: Mapping[str, tuple[int, ...]], due: frozenset[str]) -> float:
    """Of one row where these modules are computed and the others are kept."""
    plan = CacheSchedule(
        times=(1.0, 0.5),
        compute_steps={path: (1,) if path in due else () for path in updates},
        relative_flops=(1.0, 1.0),
    )
    kept = CachedOutputs()
    with skip_cached_modules(expert.model, plan, 0, kept):
        _call(expert)
    with skip_cached_modules(expert.model, plan, 1, kept):
        return forward_flops(lambda: _call(expert))


def network_rows(expert: Expert) -> float:
    """FLOPs of the network on one row."""
    return forward_flops(lambda: _call(expert))


def _call(expert: Expert) -> Tensor:
    row, t = torch.zeros(1, *expert.latent_shape), torch.full((1,), 0.5)
    with torch.no_grad():
        return call_network(expert.model, row, t, Condition.null(1))
