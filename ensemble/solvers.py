"""Integrate a velocity field from noise (t = 1) to clean (t = 0).

Every solver has the signature solver(velocity, noise, times) -> clean. The times are an argument, so no solver hides
a time grid. To add a solver, write the function and add it to `SOLVERS`.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ddm_core.random_bits import splitmix64_finalize
from ensemble.config import Solver
from experts.diffusion.few_step import FewStepSchedule
from experts.diffusion.noise_schedule import NoiseSchedule, shift_times
from experts.diffusion.predictions import to_clean

if TYPE_CHECKING:  # they import scipy.stats
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

Latents = Float[Tensor, "batch *latent"]
Times = Float[Tensor, " batch"]
TimeGrid = Float[Tensor, " time"]
"""Decreasing values of t, usually from 1 to 0; one more than there are steps."""
VelocityField = Callable[[Latents, Times], Latents]
"""(noised, t) -> d noised / d t, of one expert or of an ensemble, with or without guidance."""


def uniform_times(steps: int, shift: float = 1.0) -> TimeGrid:
    """Return the times of `steps` equal steps from t = 1 to t = 0, in float64 so that no solver adds rounding.

    A `shift` other than 1 multiplies their odds t / (1 - t), as in the experts' training.
    """
    return shift_times(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)


# The loops call `velocity` themselves, not through the step functions below: profiles and tracebacks stay short.


def euler(velocity: VelocityField, noise: Latents, times: TimeGrid) -> Latents:
    """Integrate at first order, with one velocity a step."""
    noised = noise
    for t, t_next in pairwise(times.tolist()):
        noised = noised + (t_next - t) * velocity(noised, _row_times(t, noised))
    return noised


def heun(velocity: VelocityField, noise: Latents, times: TimeGrid) -> Latents:
    """Integrate at second order, with two velocities a step and one in the last.

    The last step is Euler's, as in Karras et al. 2022, arXiv:2206.00364, algorithm 1: at t = 0 a noise or
    clean prediction has no velocity. A single first-order step leaves the global order at two.
    """
    noised = noise
    for t, t_next in pairwise(times[:-1].tolist()):
        slope = velocity(noised, _row_times(t, noised))
        next_slope = velocity(noised + (t_next - t) * slope, _row_times(t_next, noised))
        noised = noised + (t_next - t) * (slope + next_slope) / 2
    for t, t_next in pairwise(times[-2:].tolist()):
        noised = noised + (t_next - t) * velocity(noised, _row_times(t, noised))
    return noised


def euler_step(velocity: VelocityField, noised: Latents, t: float, t_next: float) -> Latents:
    """Step from t to `t_next`, which may be larger than t, with the velocity at t."""
    return noised + (t_next - t) * velocity(noised, _row_times(t, noised))


def heun_step(velocity: VelocityField, noised: Latents, t: float, t_next: float) -> Latents:
    """Step from t to `t_next` with the mean of the velocities at both ends."""
    slope = velocity(noised, _row_times(t, noised))
    next_slope = velocity(noised + (t_next - t) * slope, _row_times(t_next, noised))
    return noised + (t_next - t) * (slope + next_slope) / 2


def renoise_step(
    velocity: VelocityField,
    noised: Latents,
    t: float,
    t_next: float,
    noise_schedule: NoiseSchedule,
    fresh_noise: Latents,
) -> Latents:
    """Step from t to the clean estimate, and back to `t_next` with fresh noise; return the clean estimate at 0."""
    slope = velocity(noised, _row_times(t, noised))
    return _renoise(slope, noised, t, t_next, noise_schedule, fresh_noise)


def _renoise(
    slope: Latents, noised: Latents, t: float, t_next: float, noise_schedule: NoiseSchedule, fresh_noise: Latents
) -> Latents:
    # Song et al. 2023, arXiv:2303.01469, algorithm 1.
    clean = to_clean("velocity", slope, noised, _row_times(t, noised), noise_schedule)
    return noise_schedule.add_noise(clean, fresh_noise, _row_times(t_next, noised)) if t_next else clean


def scale_initial_noise(noise: Latents, few_step: FewStepSchedule | None, noise_schedule: NoiseSchedule) -> Latents:
    """Scale unit noise to sigma(t) at the first t of a few-step schedule; nothing is added to it."""
    # Zhou et al. 2024, arXiv:2404.04057, section 4.1: the input of the generator is sigma_init z.
    start = 1.0 if few_step is None else few_step.times[0]
    return noise if start == 1 else noise_schedule.sigma(noise.new_tensor(start)) * noise


def sample_few_step(
    velocity: VelocityField,
    noised: Latents,
    few_step: FewStepSchedule,
    noise_schedule: NoiseSchedule,
    fresh_noise: Callable[[int], Latents],
) -> Latents:
    """Run a few-step schedule from its first t to 0; `fresh_noise(step)` is the noise of a `renoise` step."""
    for step, t in enumerate(few_step.times):
        slope = velocity(noised, _row_times(t, noised))
        noised = few_step_update(slope, noised, step, few_step, noise_schedule, fresh_noise)
    return noised


def few_step_update(
    slope: Latents,
    noised: Latents,
    step: int,
    few_step: FewStepSchedule,
    noise_schedule: NoiseSchedule,
    fresh_noise: Callable[[int], Latents],
) -> Latents:
    """Return the latents after one step of a few-step schedule, from the velocity at its t."""
    t, t_next = (*few_step.times, 0.0)[step : step + 2]
    if few_step.step_types[step] == "renoise":
        return _renoise(slope, noised, t, t_next, noise_schedule, fresh_noise(step))
    return noised + (t_next - t) * slope


def flow_match_euler(velocity: VelocityField, noise: Latents, times: TimeGrid) -> Latents:
    """Run diffusers' `FlowMatchEulerDiscreteScheduler` on the given times, in float32."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=times[:-1].tolist())
    scheduler.sigmas[-1] = times[-1]
    return _run_scheduler(scheduler, velocity, noise, times[:-1])


def flow_match_heun(velocity: VelocityField, noise: Latents, times: TimeGrid) -> Latents:
    """Run diffusers' `FlowMatchHeunDiscreteScheduler` on the given times, in float32."""
    from diffusers import FlowMatchHeunDiscreteScheduler

    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(len(times) - 1)
    inner = times[1:-1].repeat_interleave(2)
    scheduler.sigmas = torch.cat([times[:1], inner, times[-1:]]).float()
    evaluated = torch.cat([times[:1], inner])
    scheduler.timesteps = evaluated * scheduler.config.num_train_timesteps
    return _run_scheduler(scheduler, velocity, noise, evaluated)


def _run_scheduler(
    scheduler: "FlowMatchEulerDiscreteScheduler | FlowMatchHeunDiscreteScheduler",
    velocity: VelocityField,
    noise: Latents,
    evaluated: TimeGrid,
) -> Latents:
    """Run one of diffusers' schedulers through the `evaluated` times."""
    scheduler.set_begin_index(0)
    noised = noise
    for t, timestep in zip(evaluated.tolist(), scheduler.timesteps, strict=True):
        noised = scheduler.step(velocity(noised, _row_times(t, noised)), timestep, noised).prev_sample
    return noised


def _row_times(t: float, noised: Latents) -> Times:
    """Return the same t for every row."""
    return noised.new_full((len(noised),), t)


def make_noise(seeds: Sequence[int], shape: Sequence[int], index: int = 0) -> Latents:
    """Draw unit Gaussian noise whose row i depends on `seeds[i]` and `index` alone, not on the batch or the device.

    `index` 0 is the noise that a trajectory starts from; each later draw of the trajectory has its own index.
    """
    if index:
        bits = np.array([seed % 2**64 for seed in seeds], np.uint64)
        seeds = [int(seed) for seed in splitmix64_finalize(bits ^ np.uint64(index << 32))]
    rows = [torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows) if rows else torch.empty(0, *shape)


SOLVERS: dict[Solver, Callable[[VelocityField, Latents, TimeGrid], Latents]] = {
    "euler": euler,
    "heun": heun,
    "flow_match_euler": flow_match_euler,
    "flow_match_heun": flow_match_heun,
}

STEPS: dict[Solver, Callable[[VelocityField, Latents, float, float], Latents]] = {
    "euler": euler_step,
    "heun": heun_step,
}
"""One step (velocity, noised, t, next t) of the solvers that keep no state between steps."""
