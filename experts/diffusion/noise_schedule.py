"""How clean becomes noise: noised = alpha(t) * clean + sigma(t) * noise, t from 0 (clean) to 1 (noise).

t may be one number, one number a row, or any tensor that broadcasts to the sample.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from experts.config import NoiseScheduleName

Latents = Float[Tensor, "batch *latent"]
Times = Float[Tensor, "..."]
TimeFunction = Callable[[Tensor], Tensor]
NoiseSource = Callable[[int], Latents]
"""Noise of the same samples for an occasion; 0 is their beginning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseSchedule:
    """A noise path and its slopes, all functions of t."""

    name: NoiseScheduleName
    alpha: TimeFunction
    sigma: TimeFunction
    alpha_dot: TimeFunction
    sigma_dot: TimeFunction
    t_at: TimeFunction
    """The inverse of `noise_to_signal`; takes 0 to 0 and infinity to 1."""

    def noise_to_signal(self, t: Times) -> Times:
        """sigma(t) / alpha(t), from 0 to infinity."""
        return self.sigma(t) / self.alpha(t)

    def add_noise(self, clean: Latents, noise: Latents, t: Times) -> Latents:
        """What lies between clean and noise at t."""
        t = expand(t, clean)
        return self.alpha(t) * clean + self.sigma(t) * noise

    def velocity(self, clean: Latents, noise: Latents, t: Times) -> Latents:
        """The derivative of `noised` by t."""
        t = expand(t, clean)
        return self.alpha_dot(t) * clean + self.sigma_dot(t) * noise


@dataclass(frozen=True, slots=True, kw_only=True)
class NoisedSample:
    """The same sample at the same noise-to-signal ratio, on another path."""

    noised: Latents
    t: Times


def expand(t: Times, like: Latents) -> Times:
    """`t` with axes of length one behind it if it is one number a row; any other t is returned as it is."""
    return t.reshape(-1, *[1] * (like.ndim - 1)) if t.ndim == 1 else t


def to_schedule(noised: Latents, t: Times, source: NoiseSchedule, target: NoiseSchedule) -> NoisedSample:
    """Move a noised sample from one path to another at equal noise-to-signal ratio; nothing about it is lost.

    Two points of equal ratio differ by a factor only, |(alpha, sigma)| of one over that of the other.
    """
    if source.name == target.name:
        return NoisedSample(noised=noised, t=t)
    moved = target.t_at(source.noise_to_signal(t))
    scale = torch.hypot(target.alpha(moved), target.sigma(moved)) / torch.hypot(source.alpha(t), source.sigma(t))
    return NoisedSample(noised=noised * expand(scale, noised), t=moved)


# Straight path (rectified flow; Liu et al. 2023, arXiv:2209.03003): alpha = 1 - t, sigma = t.
RECTIFIED_FLOW = NoiseSchedule(
    name="rectified_flow",
    alpha=lambda t: 1 - t,
    sigma=lambda t: t,
    alpha_dot=lambda t: -torch.ones_like(t),
    sigma_dot=torch.ones_like,
    t_at=lambda ratio: 1 / (1 + 1 / ratio),
)

# Variance-preserving cosine path (Nichol & Dhariwal 2021, arXiv:2102.09672, without offset):
# alpha = cos(pi t / 2), sigma = sin(pi t / 2). Written as a sine, alpha is exactly 0 at t = 1.
QUARTER_TURN = math.pi / 2
COSINE = NoiseSchedule(
    name="cosine",
    alpha=lambda t: torch.sin(QUARTER_TURN * (1 - t)),
    sigma=lambda t: torch.sin(QUARTER_TURN * t),
    alpha_dot=lambda t: -QUARTER_TURN * torch.sin(QUARTER_TURN * t),
    sigma_dot=lambda t: QUARTER_TURN * torch.sin(QUARTER_TURN * (1 - t)),
    t_at=lambda ratio: torch.atan(ratio) / QUARTER_TURN,
)

# Variance-preserving path of DDPM's linear beta (Ho et al. 2020, arXiv:2006.11239) in the limit of many timesteps
# (Song et al. 2021, arXiv:2011.13456, equation 33): alpha = exp(-G(t) / 2), G(t) = (20 - 0.1) t^2 / 2 + 0.1 t.
# It leaves a trace of the image at t = 1, and its slope has no end at t = 0. So sigma rises on a line within the first
# of DDPM's 1,000 timesteps, and alpha falls to zero on a line within the last.
BETA_START, BETA_RISE, TIMESTEP = 0.1, 19.9, 1e-3


def _decay(t: Tensor) -> Tensor:
    """G(t) = - log alpha^2 between the two lines."""
    t = t.clamp(TIMESTEP, 1 - TIMESTEP)
    return BETA_RISE * t**2 / 2 + BETA_START * t


def _decay_dot(t: Tensor) -> Tensor:
    return BETA_RISE * t + BETA_START


_DECAYS = _decay(torch.tensor([0.0, 1.0], dtype=torch.float64))
FIRST_SIGMA = float((-torch.expm1(-_DECAYS[0])).sqrt())
LAST_ALPHA = float(torch.exp(-_DECAYS[1] / 2))


def _pieces(t: Tensor, first: Tensor, between: Tensor, last: Tensor) -> Tensor:
    return torch.where(t < TIMESTEP, first, torch.where(t > 1 - TIMESTEP, last, between))


def _linear_alpha(t: Tensor) -> Tensor:
    early = FIRST_SIGMA * (t / TIMESTEP).clamp(max=1)
    return _pieces(t, (1 - early**2).sqrt(), (-_decay(t) / 2).exp(), LAST_ALPHA * (1 - t) / TIMESTEP)


def _linear_sigma(t: Tensor) -> Tensor:
    late = LAST_ALPHA * ((1 - t) / TIMESTEP).clamp(max=1)
    return _pieces(t, FIRST_SIGMA * t / TIMESTEP, (-torch.expm1(-_decay(t))).sqrt(), (1 - late**2).sqrt())


def _linear_alpha_dot(t: Tensor) -> Tensor:
    alpha, sigma = _linear_alpha(t), _linear_sigma(t)
    first, last = -sigma / alpha * (FIRST_SIGMA / TIMESTEP), torch.full_like(t, -LAST_ALPHA / TIMESTEP)
    return _pieces(t, first, -_decay_dot(t) * alpha / 2, last)


def _linear_sigma_dot(t: Tensor) -> Tensor:
    alpha, sigma = _linear_alpha(t), _linear_sigma(t)
    first, last = torch.full_like(t, FIRST_SIGMA / TIMESTEP), alpha / sigma * (LAST_ALPHA / TIMESTEP)
    return _pieces(t, first, _decay_dot(t) * alpha**2 / (2 * sigma), last)


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
    path.name: path for path in (RECTIFIED_FLOW, COSINE, LINEAR_BETA)
}
