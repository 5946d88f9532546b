"""Noise schedules: noised = alpha(t) * clean + sigma(t) * noise, t from 0 (clean) to 1 (noise).

t may be one number, one number a row, or any tensor that broadcasts to the sample.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from experts.config import NoiseScheduleName
from experts.types import Latents, Times

TimeFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseSchedule:
    """alpha(t), sigma(t) and their derivatives."""

    name: NoiseScheduleName
    alpha: TimeFunction
    sigma: TimeFunction
    alpha_dot: TimeFunction
    sigma_dot: TimeFunction
    t_at: TimeFunction
    """The inverse of `noise_to_signal`; maps 0 to 0 and infinity to 1."""

    def noise_to_signal(self, t: Times) -> Times:
        """Return sigma(t) / alpha(t), from 0 to infinity."""
        return self.sigma(t) / self.alpha(t)

    def add_noise(self, clean: Latents, noise: Latents, t: Times) -> Latents:
        """Return alpha(t) * clean + sigma(t) * noise."""
        t = expand(t, clean)
        return self.alpha(t) * clean + self.sigma(t) * noise

    def velocity(self, clean: Latents, noise: Latents, t: Times) -> Latents:
        """Return d noised / dt = alpha'(t) * clean + sigma'(t) * noise."""
        t = expand(t, clean)
        return self.alpha_dot(t) * clean + self.sigma_dot(t) * noise


@dataclass(frozen=True, slots=True, kw_only=True)
class NoisedSample:
    """A noised sample and its t on one noise schedule."""

    noised: Latents
    t: Times


def expand(t: Times, like: Latents) -> Times:
    """Append axes of length one to a `t` of one number a row; return any other t unchanged."""
    return t.reshape(-1, *[1] * (like.ndim - 1)) if t.ndim == 1 else t


def to_schedule(noised: Latents, t: Times, source: NoiseSchedule, target: NoiseSchedule) -> NoisedSample:
    """Convert a noised sample from one noise schedule to another at equal noise-to-signal ratio, without loss.

    Two points of equal ratio differ only by the factor |(alpha, sigma)| of the target over that of the source.
    """
    if source.name == target.name:
        return NoisedSample(noised=noised, t=t)
    target_t = target.t_at(source.noise_to_signal(t))
    scale = torch.hypot(target.alpha(target_t), target.sigma(target_t)) / torch.hypot(source.alpha(t), source.sigma(t))
    return NoisedSample(noised=noised * expand(scale, noised), t=target_t)


# Straight interpolation (rectified flow; Liu et al. 2023, arXiv:2209.03003): alpha = 1 - t, sigma = t.
RECTIFIED_FLOW = NoiseSchedule(
    name="rectified_flow",
    alpha=lambda t: 1 - t,
    sigma=lambda t: t,
    alpha_dot=lambda t: -torch.ones_like(t),
    sigma_dot=torch.ones_like,
    t_at=lambda ratio: 1 / (1 + 1 / ratio),
)

# Variance-preserving cosine schedule (Nichol & Dhariwal 2021, arXiv:2102.09672, without offset):
# alpha = cos(pi t / 2), sigma = sin(pi t / 2). Computed as a sine, alpha is exactly 0 at t = 1.
HALF_PI = math.pi / 2
COSINE = NoiseSchedule(
    name="cosine",
    alpha=lambda t: torch.sin(HALF_PI * (1 - t)),
    sigma=lambda t: torch.sin(HALF_PI * t),
    alpha_dot=lambda t: -HALF_PI * torch.sin(HALF_PI * t),
    sigma_dot=lambda t: HALF_PI * torch.sin(HALF_PI * (1 - t)),
    t_at=lambda ratio: torch.atan(ratio) / HALF_PI,
)

# Variance-preserving schedule of DDPM's linear beta (Ho et al. 2020, arXiv:2006.11239) in the limit of many timesteps
# (Song et al. 2021, arXiv:2011.13456, equation 33): alpha = exp(-G(t) / 2), G(t) = (20 - 0.1) t^2 / 2 + 0.1 t.
# It keeps a trace of the image at t = 1, and the slope of sigma is infinite at t = 0. So sigma rises linearly within
# the first of DDPM's 1,000 timesteps, and alpha falls linearly to zero within the last.
BETA_START, BETA_RISE, TIMESTEP = 0.1, 19.9, 1e-3


def _decay(t: Tensor) -> Tensor:
    """Return G(t) = -log alpha^2 between the two linear pieces."""
    t = t.clamp(TIMESTEP, 1 - TIMESTEP)
    return BETA_RISE * t**2 / 2 + BETA_START * t


def _decay_dot(t: Tensor) -> Tensor:
    return BETA_RISE * t + BETA_START


_DECAYS = _decay(torch.tensor([0.0, 1.0], dtype=torch.float64))
FIRST_SIGMA = float((-torch.expm1(-_DECAYS[0])).sqrt())
LAST_ALPHA = float(torch.exp(-_DECAYS[1] / 2))


def _select_piece(t: Tensor, first: Tensor, between: Tensor, last: Tensor) -> Tensor:
    return torch.where(t < TIMESTEP, first, torch.where(t > 1 - TIMESTEP, last, between))


def _linear_alpha(t: Tensor) -> Tensor:
    early = FIRST_SIGMA * (t / TIMESTEP).clamp(max=1)
    return _select_piece(t, (1 - early**2).sqrt(), (-_decay(t) / 2).exp(), LAST_ALPHA * (1 - t) / TIMESTEP)


def _linear_sigma(t: Tensor) -> Tensor:
    late = LAST_ALPHA * ((1 - t) / TIMESTEP).clamp(max=1)
    return _select_piece(t, FIRST_SIGMA * t / TIMESTEP, (-torch.expm1(-_decay(t))).sqrt(), (1 - late**2).sqrt())


def _linear_alpha_dot(t: Tensor) -> Tensor:
    alpha, sigma = _linear_alpha(t), _linear_sigma(t)
    first, last = -sigma / alpha * (FIRST_SIGMA / TIMESTEP), torch.full_like(t, -LAST_ALPHA / TIMESTEP)
    return _select_piece(t, first, -_decay_dot(t) * alpha / 2, last)


def _linear_sigma_dot(t: Tensor) -> Tensor:
    alpha, sigma = _linear_alpha(t), _linear_sigma(t)
    first, last = torch.full_like(t, FIRST_SIGMA / TIMESTEP), alpha / sigma * (LAST_ALPHA / TIMESTEP)
    return _select_piece(t, first, _decay_dot(t) * alpha**2 / (2 * sigma), last)


def _linear_t_at(ratio: Tensor) -> Tensor:
    decay = torch.log1p(ratio**2)
    between = 2 * decay / (BETA_START + (BETA_START**2 + 2 * BETA_RISE * decay).sqrt())
    alpha, sigma = 1 / torch.hypot(torch.ones_like(ratio), ratio), 1 / torch.hypot(torch.ones_like(ratio), 1 / ratio)
    late = torch.where(alpha < LAST_ALPHA, 1 - TIMESTEP * alpha / LAST_ALPHA, between)
    return torch.where(sigma < FIRST_SIGMA, TIMESTEP * sigma / FIRST_SIGMA, late)


LINEAR_BETA = NoiseSchedule(
    name="linear_beta",
    alpha=_linear_alpha,
    sigma=_linear_sigma,
    alpha_dot=_linear_alpha_dot,
    sigma_dot=_linear_sigma_dot,
    t_at=_linear_t_at,
)

NOISE_SCHEDULES: dict[NoiseScheduleName, NoiseSchedule] = {
    schedule.name: schedule for schedule in (RECTIFIED_FLOW, COSINE, LINEAR_BETA)
}
