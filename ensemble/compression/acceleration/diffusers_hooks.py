"""Caching with diffusers' own hooks: attach one to every expert, calibrated and counted along its own trajectories.

TaylorSeer (Liu et al. 2025, arXiv:2503.06923), first-block cache (from TeaCache, Liu et al. 2024, arXiv:2411.19108),
MagCache (Ma et al. 2025, arXiv:2506.09045), pyramid attention broadcast (Zhao et al. 2024, arXiv:2408.12588),
FasterCache (Lv et al. 2024, arXiv:2410.19355).
"""

import contextlib
import io
import json
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from ddm_core.artifacts import Preempted, Workspace
from ensemble.compression.acceleration.config import HookConfig
from ensemble.compression.acceleration.feature_cache import MIN_SAVED_SHARE
from ensemble.compression.method import CompressionContext, EnsembleResult, StageError
from ensemble.solvers import euler_step, make_noise, uniform_times
from experts.compressed.caching.diffusers_hooks import CacheHook, apply_cache_hook
from experts.compressed.caching.plan import CacheSchedule
from experts.conditions.condition import Condition
from experts.expert import Expert
from experts.training.flops import forward_flops

SINGLE_CALL_SOLVERS = ("euler", "flow_match_euler")
"""Solvers with one network call per step; hooks count calls as steps."""


def hook_all(config: HookConfig, context: CompressionContext) -> EnsembleResult:
    """Attach a hook to every expert of an ensemble, for its sampling settings.

    Raises `StageError` for another solver, a network that the hook does not support, or if it saves less than 1 %.
    """
    if context.sampling.solver not in SINGLE_CALL_SOLVERS:
        raise StageError(
            f"diffusers' hooks count calls as steps, and {context.sampling.solver} makes two calls per step; set "
            "accelerate=cache, or start another run with ensemble.solver=euler"
        )
    experts, flops = context.load_single_networks("hook"), 0.0
    times = tuple(uniform_times(context.sampling.steps, next(iter(experts.values())).t_shift)[:-1].tolist())
    cached, details = {}, {}
    for k, expert in experts.items():
        schedule, calibration_flops = calibrate_hook(expert, config, times, context.workspace)
        share = sum(schedule.relative_flops) / len(times)
        if config.interval > 1 and share > 1 - MIN_SAVED_SHARE:
            raise StageError(
                f"a hook must save 1 % of the FLOPs, and expert {k} would keep {share:.1%} of them; raise "
                "accelerate.interval or accelerate.threshold"
            )
        cached[k], flops = replace(expert, cache=schedule), flops + calibration_flops
        details[str(k)] = {"flops": share, "hook": schedule.hook}
    return EnsembleResult(experts=cached, modules=len(cached), flops=flops, details=details)


def calibrate_hook(
    expert: Expert, config: HookConfig, times: tuple[float, ...], workspace: Workspace
) -> tuple[CacheSchedule, float]:
    """Return the hook's schedule for an expert, with counted FLOPs, and the FLOPs of calibration.

    `first_block` decides for each sample separately, so its FLOPs are means over samples.
    """
    ratios = _measure_ratios(expert, config, times, workspace) if config.hook == "mag" else ()
    hook = CacheHook(
        kind=config.hook, interval=config.interval, order=config.order, threshold=config.threshold, ratios=ratios
    )
    rows = 1 if config.hook == "first_block" else config.rows
    counted = [
        _count_step_flops(expert, _apply_hook(expert.model, hook), range(start, start + rows), times, workspace)
        for start in range(config.seed, config.seed + config.rows, rows)
    ]
    full_step = _count_step_flops(expert, expert.model, range(1), times[:1], workspace)[0]
    relative = tuple(min(1.0, sum(step) / (full_step * config.rows)) for step in zip(*counted, strict=True))
    flops = sum(map(sum, counted)) + (full_step * config.rows * len(times) if ratios else 0.0)
    return CacheSchedule(times=times, compute_steps={}, relative_flops=relative, hook=hook), flops


def _apply_hook(model: nn.Module, hook: CacheHook, calibrate: int = 0) -> nn.Module:
    """Return a copy of the network with the hook; raise `StageError` if the hook does not support it."""
    try:
        return apply_cache_hook(model, hook, calibrate=calibrate)
    except ValueError as error:
        raise StageError(f"{error}; set accelerate=cache") from error


def _count_step_flops(
    expert: Expert, model: nn.Module, seeds: range, times: tuple[float, ...], workspace: Workspace
) -> list[float]:
    """Count the FLOPs of every step along the trajectories of these samples."""
    flops, hooked, condition = [], replace(expert, model=model, cache=None), Condition.null(len(seeds))
    noised = [make_noise(seeds, expert.latent_shape)]

    def step(t: float, t_next: float) -> Tensor:
        return euler_step(lambda latents, now: hooked.velocity(latents, now, condition), noised[0], t, t_next)

    with torch.no_grad():
        for t, t_next in pairwise([*times, 0.0]):
            if workspace.stop_requested():
                raise Preempted("stopped while a hook was calibrated; calibration restarts")
            flops.append(forward_flops(lambda t=t, t_next=t_next: noised.insert(0, step(t, t_next))))
    return flops


def _measure_ratios(
    expert: Expert, config: HookConfig, times: tuple[float, ...], workspace: Workspace
) -> tuple[float, ...]:
    """Return the magnitude ratios of MagCache, which it only prints at the end of a calibration."""
    model = _apply_hook(expert.model, CacheHook(kind="mag"), calibrate=len(times))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        _count_step_flops(expert, model, range(config.seed, config.seed + config.rows), times, workspace)
    lines = [line for line in printed.getvalue().splitlines() if line.startswith("[") and line.endswith("]")]
    if not lines:
        raise StageError(
            "MagCache printed no ratios, which it does since diffusers 0.36; update diffusers, or set another "
            "accelerate.hook"
        )
    return tuple(float(ratio) for ratio in json.loads(lines[-1]))
