"""Noise schedules: noised = alpha(t) * clean + sigma(t) * noise, t from 0 (clean) to 1 (noise).

t may be one number, one number a row, or any tensor that broadcasts to the sample.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

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
    is_straight: bool = False
    """Whether the velocity is noise - clean at every t."""

    def noise_to_signal(self, t: Times) -> Times:
        """Return sigma(t) / alpha(t), from 0 to infinity."""
        return self.sigma(t) / self.alpha(t)

    def add_noise(self, clean: Latents, noise: Latents, t: Times) -> Latents:
        """Return alpha(t) * clean + sigma(t) * noise."""
        t = expand(t, clean)
        return self.alpha(t) * clean + self.sigma(t) * noise

    def velocity(self, clean: Latents, noise: Latents, t: Times) -> Latents:
        """Return d noised / dt = alpha'(t) * clean + sigma'(t) * noise."""
        if self.is_straight:
            return noise - clean
        t = expand(t, clean)
        return self.alpha_dot(t) * clean + self.sigma_dot(t) * noise


def shift_times(t: Tensor, shift: float) -> Tensor:
    """Return t with odds t / (1 - t) multiplied by `shift`; 0 and 1 stay.

    Esser et al. 2024, arXiv:2403.03206, equation 23.
    """
    return t if shift == 1 else shift * t / (1 + (shift - 1) * t)


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
    is_straight=True,
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

TIMESTEPS, TIMESTEP = 1000, 1e-3
"""Timesteps of DDPM, and the t between two of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decay:
    """G(t) = -log alpha(t)^2 of a variance-preserving schedule, its derivative and its inverse."""

    at: TimeFunction
    dot: TimeFunction
    inverse: TimeFunction


def _variance_preserving(name: NoiseScheduleName, decay: _Decay) -> NoiseSchedule:
    """Return the schedule alpha = exp(-G / 2), sigma = sqrt(1 - alpha^2), with alpha(1) = sigma(0) = 0.

    DDPM keeps a trace of the image at its last timestep, and some noise at its first. So sigma rises linearly within
    the first of the 1,000 timesteps, and alpha falls linearly to zero within the last.
    """
    ends = decay.at(torch.tensor([TIMESTEP, 1 - TIMESTEP], dtype=torch.float64))
    first_sigma, last_alpha = float((-torch.expm1(-ends[0])).sqrt()), float(torch.exp(-ends[1] / 2))

    def clamped(t: Tensor) -> Tensor:
        return decay.at(t.clamp(TIMESTEP, 1 - TIMESTEP))

    def alpha(t: Tensor) -> Tensor:
        early = first_sigma * (t / TIMESTEP).clamp(max=1)
        return _select_piece(t, (1 - early**2).sqrt(), (-clamped(t) / 2).exp(), last_alpha * (1 - t) / TIMESTEP)

    def sigma(t: Tensor) -> Tensor:
        late = last_alpha * ((1 - t) / TIMESTEP).clamp(max=1)
        return _select_piece(t, first_sigma * t / TIMESTEP, (-torch.expm1(-clamped(t))).sqrt(), (1 - late**2).sqrt())

    def alpha_dot(t: Tensor) -> Tensor:
        first, last = -sigma(t) / alpha(t) * (first_sigma / TIMESTEP), torch.full_like(t, -last_alpha / TIMESTEP)
        return _select_piece(t, first, -decay.dot(t) * alpha(t) / 2, last)

    def sigma_dot(t: Tensor) -> Tensor:
        first, last = torch.full_like(t, first_sigma / TIMESTEP), alpha(t) / sigma(t) * (last_alpha / TIMESTEP)
        return _select_piece(t, first, decay.dot(t) * alpha(t) ** 2 / (2 * sigma(t)), last)

    def t_at(ratio: Tensor) -> Tensor:
        between = decay.inverse(torch.log1p(ratio**2))
        low, high = 1 / torch.hypot(torch.ones_like(ratio), ratio), 1 / torch.hypot(torch.ones_like(ratio), 1 / ratio)
        late = torch.where(low < last_alpha, 1 - TIMESTEP * low / last_alpha, between)
        return torch.where(high < first_sigma, TIMESTEP * high / first_sigma, late)

    return NoiseSchedule(name=name, alpha=alpha, sigma=sigma, alpha_dot=alpha_dot, sigma_dot=sigma_dot, t_at=t_at)


def _select_piece(t: Tensor, first: Tensor, between: Tensor, last: Tensor) -> Tensor:
    return torch.where(t < TIMESTEP, first, torch.where(t > 1 - TIMESTEP, last, between))


# DDPM's linear beta (Ho et al. 2020, arXiv:2006.11239) in the limit of many timesteps (Song et al. 2021,
# arXiv:2011.13456, equation 33): G(t) = (20 - 0.1) t^2 / 2 + 0.1 t.
BETA_START, BETA_RISE = 0.1, 19.9
LINEAR_BETA = _variance_preserving(
    "linear_beta",
    _Decay(
        at=lambda t: BETA_RISE * t**2 / 2 + BETA_START * t,
        dot=lambda t: BETA_RISE * t + BETA_START,
        inverse=lambda decay: 2 * decay / (BETA_START + (BETA_START**2 + 2 * BETA_RISE * decay).sqrt()),
    ),
)


def _table_decay(betas: Tensor) -> _Decay:
    """Return the G of a table of betas: timestep i is t = i / 1000, and G is linear in between."""
    host_table = -torch.log1p(-betas).cumsum(0)
    table_on = cache(host_table.to)

    def ends(index: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return G at both ends of these intervals."""
        index, table = index.clamp(0, TIMESTEPS - 2), table_on(like.device)
        return table[index].to(like), table[index + 1].to(like)

    def at(t: Tensor) -> Tensor:
        index = (t.detach() * TIMESTEPS).floor().long().clamp(0, TIMESTEPS - 2)
        low, high = ends(index, t)
        return low + (high - low) * (t * TIMESTEPS - index)

    def dot(t: Tensor) -> Tensor:
        low, high = ends((t * TIMESTEPS).floor().long(), t)
        return (high - low) * TIMESTEPS

    def inverse(decay: Tensor) -> Tensor:
        index = (torch.searchsorted(table_on(decay.device), decay.double()) - 1).clamp(0, TIMESTEPS - 2)
        low, high = ends(index, decay)
        return (index + (decay - low) / (high - low)) / TIMESTEPS

    return _Decay(at=at, dot=dot, inverse=inverse)


# The tables that networks were trained on: DDPM's, which DiT and PixArt share, and that of Stable Diffusion
# (Rombach et al. 2022, arXiv:2112.10752), whose betas are squares of evenly spaced numbers.
DDPM_LINEAR = _variance_preserving(
    "ddpm_linear", _table_decay(torch.linspace(1e-4, 0.02, TIMESTEPS, dtype=torch.float64))
)
SCALED_LINEAR = _variance_preserving(
    "scaled_linear", _table_decay(torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64) ** 2)
)

NOISE_SCHEDULES: dict[NoiseScheduleName, NoiseSchedule] = {
    schedule.name: schedule for schedule in (RECTIFIED_FLOW, COSINE, LINEAR_BETA, DDPM_LINEAR, SCALED_LINEAR)
}
