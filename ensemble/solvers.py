"""Integrate a velocity field from noise (t = 1) to clean (t = 0).

One contract: solver(velocity, noise, times) -> clean. The times are an argument, so no solver hides a
schedule. To add a solver, write the function and add it to `SOLVERS`.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from jaxtyping import Float
from torch import Tensor

from ddm_core.random_bits import splitmix64_finalize
from ensemble.config import Solver
from experts.diffusion.few_step import FewStepSchedule
from experts.diffusion.noise_schedule import NoiseSchedule
from experts.diffusion.predictions import to_clean

Latents = Float[Tensor, "batch *latent"]
Times = Float[Tensor, " batch"]
TimeGrid = Float[Tensor, " time"]
"""Falling values of t, usually from 1 to 0; one more than there are steps."""
VelocityField = Callable[[Latents, Times], Latents]
"""(noised, t) -> d noised / d t; one expert, an ensemble, either of them with guidance."""


def uniform_times(steps: int) -> TimeGrid:
    """`steps` equal steps from t = 1 to t = 0, in float64 so that no solver adds rounding to them."""
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def euler(velocity: VelocityField, noise: Latents, times: TimeGrid) -> Latents:
    """First order, one velocity a step."""
    noised = noise
    for t, t_next in pairwise(times.tolist()):
        noised = euler_step(velocity, noised, t, t_next)
    return noised


def euler_step(velocity: VelocityField, noised: Latents, t: float, t_next: float) -> Latents:
    """From t to `t_next`, which may be the larger one, by the velocity at t."""
    return noised + (t_next - t) * velocity(noised, _rows(t, noised))


def heun(velocity: VelocityField, noise: Latents, times: TimeGrid) -> Latents:
    """Second order: two velocities a step, one in the last.

    The last step is Euler's, as in Karras et al. 2022, arXiv:2206.00364, algorithm 1: at t = 0 a noise or
    clean prediction has no velocity. A single shorter-order step leaves the global order at two.
    """
    noised = noise
    for t, t_next in pairwise(times[:-1].tolist()):
        noised = heun_step(velocity, noised, t, t_next)
    return euler(velocity, noised, times[-2:])


def heun_step(velocity: VelocityField, noised: Latents, t: float, t_next: float) -> Latents:
    """From t to `t_next` by the mean of the velocities at both ends."""
    slope = velocity(noised, _rows(t, noised))
    ahead = velocity(noised + (t_next - t) * slope, _rows(t_next, noised))
    return noised + (t_next - t) * (slope + ahead) / 2


def renoise_step(
    velocity: VelocityField, noised: Latents, t: float, t_next: float, path: NoiseSchedule, fresh: Latents
) -> Latents:
    """From t to the clean estimate there, and back to `t_next` with fresh noise; to the clean estimate at 0."""
    # Song et al. 2023, arXiv:2303.01469, algorithm 1.
    times = _rows(t, noised)
    clean = to_clean("velocity", velocity(noised, times), noised, times, path)
    return path.add_noise(clean, fresh, _rows(t_next, noised)) if t_next else clean


def scale_initial_noise(noise: Latents, course: FewStepSchedule | None, path: NoiseSchedule) -> Latents:
    """Noise where a course begins: at t < 1 it is as strong as the noise of a sample there, and nothing is added."""
    # Zhou et al. 2024, arXiv:2404.04057, section 4.1: the generator is given sigma_init z.
    start = 1.0 if course is None else course.times[0]
    return noise if start == 1 else path.sigma(noise.new_tensor(start)) * noise


def sample_few_step(
    velocity: VelocityField,
    noised: Latents,
    course: FewStepSchedule,
    path: NoiseSchedule,
    fresh: Callable[[int], Latents],
) -> Latents:
    """From the beginning of a course to its end; `fresh` gives the noise of every step that wants some."""
    for index, (way, t, t_next) in enumerate(
        zip(course.step_types, course.times, (*course.times[1:], 0.0), strict=True)
    ):
        if way == "renoise":
            noised = renoise_step(velocity, noised, t, t_next, path, fresh(index))
        else:
            noised = euler_step(velocity, noised, t, t_next)
    return noised


def flow_match_euler(velocity: VelocityField, noise: Latents, times: TimeGrid) -> Latents:
    """diffusers' `FlowMatchEulerDiscreteScheduler` on the given times; float32."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=times[:-1].tolist())
    scheduler.sigmas[-1] = times[-1]
    return _scheduled(scheduler, velocity, noise, times[:-1])


def flow_match_heun(velocity: VelocityField, noise: Latents, times: TimeGrid) -> Latents:
    """diffusers' `FlowMatchHeunDiscreteScheduler` on the given times; float32."""
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(len(times) - 1)
    inner = times[1:-1].repeat_interleave(2)
    scheduler.sigmas = torch.cat([times[:1], inner, times[-1:]]).float()
    visited = torch.cat([times[:1], inner])
    scheduler.timesteps = visited * scheduler.config.num_train_timesteps
    return _scheduled(scheduler, velocity, noise, visited)


def _scheduled(
    scheduler: FlowMatchEulerDiscreteScheduler | FlowMatchHeunDiscreteScheduler,
    velocity: VelocityField,
    noise: Latents,
    visited: TimeGrid,
) -> Latents:
    """Let one of diffusers' schedulers take its steps through the `visited` times."""
    scheduler.set_begin_index(0)
    noised = noise
    for t, timestep in zip(visited.tolist(), scheduler.timesteps, strict=True):
        noised = scheduler.step(velocity(noised, _rows(t, noised)), timestep, noised).prev_sample
    return noised


def _rows(t: float, noised: Latents) -> Times:
    """The same t for every row."""
    return noised.new_full((len(noised),), t)


def noise_for(seeds: Sequence[int], shape: Sequence[int], occasion: int = 0) -> Latents:
    """Unit Gaussian noise whose row i is a function of `seeds[i]` alone, whatever the batch or the device.

    `occasion` 0 is where a sample begins; what it needs later has other numbers.
    """
    if occasion:
        bits = np.array([seed % 2**64 for seed in seeds], np.uint64)
        seeds = [int(seed) for seed in splitmix64_finalize(bits ^ np.uint64(occasion << 32))]
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
"""One step (velocity, noised, t, next t) of the solvers that remember nothing between two of them."""
