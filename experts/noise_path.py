"""How clean becomes noise: noised = alpha(t) * clean + sigma(t) * noise, t from 0 (clean) to 1 (noise).

t may be one number, one number a row, or any tensor that broadcasts to the sample.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from experts.config import PathName

Latents = Float[Tensor, "batch *latent"]
Times = Float[Tensor, "..."]
OfTime = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class NoisePath:
    """A noise path and its slopes, all functions of t."""

    name: PathName
    alpha: OfTime
    sigma: OfTime
    alpha_dot: OfTime
    sigma_dot: OfTime
    t_at: OfTime
    """The inverse of `noise_to_signal`; takes 0 to 0 and infinity to 1."""

    def noise_to_signal(self, t: Times) -> Times:
        """sigma(t) / alpha(t), from 0 to infinity."""
        return self.sigma(t) / self.alpha(t)

    def noised(self, clean: Latents, noise: Latents, t: Times) -> Latents:
        """What lies between clean and noise at t."""
        t = expand(t, clean)
        return self.alpha(t) * clean + self.sigma(t) * noise

    def velocity(self, clean: Latents, noise: Latents, t: Times) -> Latents:
        """The derivative of `noised` by t."""
        t = expand(t, clean)
        return self.alpha_dot(t) * clean + self.sigma_dot(t) * noise


@dataclass(frozen=True, slots=True, kw_only=True)
class Matched:
    """The same sample at the same noise-to-signal ratio, on another path."""

    noised: Latents
    t: Times


def expand(t: Times, like: Latents) -> Times:
    """`t` with axes of length one behind it if it is one number a row; any other t is returned as it is."""
    return t.reshape(-1, *[1] * (like.ndim - 1)) if t.ndim == 1 else t


def matched(noised: Latents, t: Times, source: NoisePath, target: NoisePath) -> Matched:
    """Move a noised sample from one path to another at equal noise-to-signal ratio; nothing about it is lost.

    Two points of equal ratio differ by a factor only, |(alpha, sigma)| of one over that of the other.
    """
    if source.name == target.name:
        return Matched(noised=noised, t=t)
    moved = target.t_at(source.noise_to_signal(t))
    scale = torch.hypot(target.alpha(moved), target.sigma(moved)) / torch.hypot(source.alpha(t), source.sigma(t))
    return Matched(noised=noised * expand(scale, noised), t=moved)


# Straight path (rectified flow; Liu et al. 2023, arXiv:2209.03003): alpha = 1 - t, sigma = t.
STRAIGHT = NoisePath(
    name="straight",
    alpha=lambda t: 1 - t,
    sigma=lambda t: t,
    alpha_dot=lambda t: -torch.ones_like(t),
    sigma_dot=torch.ones_like,
    t_at=lambda ratio: 1 / (1 + 1 / ratio),
)

# Variance-preserving cosine path (Nichol & Dhariwal 2021, arXiv:2102.09672, without offset):
# alpha = cos(pi t / 2), sigma = sin(pi t / 2). Written as a sine, alpha is exactly 0 at t = 1.
QUARTER_TURN = math.pi / 2
COSINE = NoisePath(
    name="cosine",
    alpha=lambda t: torch.sin(QUARTER_TURN * (1 - t)),
    sigma=lambda t: torch.sin(QUARTER_TURN * t),
    alpha_dot=lambda t: -QUARTER_TURN * torch.sin(QUARTER_TURN * t),
    sigma_dot=lambda t: QUARTER_TURN * torch.sin(QUARTER_TURN * (1 - t)),
    t_at=lambda ratio: torch.atan(ratio) / QUARTER_TURN,
)

PATHS: dict[PathName, NoisePath] = {path.name: path for path in (STRAIGHT, COSINE)}
