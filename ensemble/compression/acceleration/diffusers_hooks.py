"""diffusers' cache hooks as a stage: one for every expert, calibrated and counted along its own trajectories."""

import contextlib
import io
import json
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from ddm_core.artifacts import Preempted, Workspace
from ensemble.compression.acceleration.config import HookConfig
from ensemble.compression.acceleration.feature_cache import LEAST_SAVED
from ensemble.compression.method import CompressionContext, EnsembleResult, StageError
from ensemble.solvers import euler_step, noise_for, uniform_times
from experts.compressed.caching.diffusers_hooks import CacheHook, apply_cache_hook
from experts.compressed.caching.plan import CacheSchedule
from experts.condition import Condition
from experts.expert import Expert
from experts.training.flops import forward_flops

ONCE_A_STEP = ("euler", "flow_match_euler")
"""Solvers that call the velocity once a step: hooks count calls."""


def hook_all(config: HookConfig, given: CompressionContext) -> EnsembleResult:
    """Every expert of an ensemble with a hook for this way of sampling.

    Raises `StageError` for another solver, a network that the hook does not match, or if hardly anything is saved.
    """
    if given.sampling.solver not in ONCE_A_STEP:
        raise StageError(
            f"diffusers' hooks count calls, and {given.sampling.solver} makes two a step; set ensemble.solver=euler, "
            "or take accelerate=cache"
        )
    times = tuple(uniform_times(given.sampling.steps)[:-1].tolist())
    experts, flops = given.experts("hook"), 0.0
    made, details = {}, {}
    for k, expert in experts.items():
        plan, spent = cache_schedule(expert, config, times, given.workspace)
        share = sum(plan.relative_flops) / len(times)
        if config.interval > 1 and share > 1 - LEAST_SAVED:
            raise StageError(f"with this hook expert {k} would have {share:.1%} of its FLOPs; let it keep more")
        made[k], flops = replace(expert, cache=plan), flops + spent
        details[str(k)] = {"flops": share, "hook": plan.hook}
    return EnsembleResult(experts=made, modules=len(made), flops=flops, details=details)


def cache_schedule(
    expert: Expert, config: HookConfig, times: tuple[float, ...], workspace: Workspace
) -> tuple[CacheSchedule, float]:
    """The hook with what it needs to know of the expert, and the FLOPs of finding out.

    `first_block` decides anew for each sample; its costs are means over some.
    """
    ratios = _ratios(expert, config, times, workspace) if config.hook == "mag" else ()
    hook = CacheHook(
        kind=config.hook, interval=config.interval, order=config.order, threshold=config.threshold, ratios=ratios
    )
    rows = 1 if config.hook == "first_block" else config.rows
    counted = [
        _costs(expert, _hooked(expert.model, hook), range(start, start + rows), times, workspace)
        for start in range(config.seed, config.seed + config.rows, rows)
    ]
    whole = _costs(expert, expert.model, range(1), times[:1], workspace)[0]
    costs = tuple(min(1.0, sum(step) / (whole * config.rows)) for step in zip(*counted, strict=True))
    spent = sum(map(sum, counted)) + (whole * config.rows * len(times) if ratios else 0.0)
    return CacheSchedule(times=times, compute_steps={}, relative_flops=costs, hook=hook), spent


def _hooked(model: nn.Module, hook: CacheHook, calibrate: int = 0) -> nn.Module:
    try:
        return apply_cache_hook(model, hook, calibrate=calibrate)
    except ValueError as error:
        raise StageError(f"{error}; take accelerate=cache") from error


def _costs(
    expert: Expert, model: nn.Module, seeds: range, times: tuple[float, ...], workspace: Workspace
) -> list[float]:
    """FLOPs of every step of these samples' trajectories."""
    costs, spoken, condition = [], replace(expert, model=model, cache=None), Condition.null(len(seeds))
    noised = [noise_for(seeds, expert.latent_shape)]

    def step(t: float, t_next: float) -> Tensor:
        return euler_step(lambda at, now: spoken.velocity(at, now, condition), noised[0], t, t_next)

    with torch.no_grad():
        for t, t_next in pairwise([*times, 0.0]):
            if workspace.stop_requested():
                raise Preempted("stopped while a hook was tried; it is tried again")
            costs.append(forward_flops(lambda t=t, t_next=t_next: noised.insert(0, step(t, t_next))))
    return costs


def _ratios(expert: Expert, config: HookConfig, times: tuple[float, ...], workspace: Workspace) -> tuple[float, ...]:
    """What MagCache prints when it has seen as many calls as it was told."""
    model = _hooked(expert.model, CacheHook(kind="mag"), calibrate=len(times))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        _costs(expert, model, range(config.seed, config.seed + config.rows), times, workspace)
    lines = [line for line in printed.getvalue().splitlines() if line.startswith("[") and line.endswith("]")]
    if not lines:
        raise StageError("MagCache printed no ratios, which it does since diffusers 0.36; take another accelerate.hook")
    return tuple(float(ratio) for ratio in json.loads(lines[-1]))
