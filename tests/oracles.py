"""Experts and routers that are exactly right, in closed form: a mixture of Gaussians, one component a cluster."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from experts.condition import Condition
from experts.diffusion.noise_schedule import RECTIFIED_FLOW, NoiseSchedule, expand


def gaussian_velocity(noised: Tensor, t: Tensor, mean: Tensor, deviation: float, path: NoiseSchedule) -> Tensor:
    """E[alpha' clean + sigma' noise | noised] for clean ~ N(mean, deviation^2)."""
    t = expand(t, noised)
    alpha, sigma = path.alpha(t), path.sigma(t)
    variance = alpha**2 * deviation**2 + sigma**2
    residual = noised - alpha * mean
    clean = mean + alpha * deviation**2 / variance * residual
    noise = sigma / variance * residual
    return path.alpha_dot(t) * clean + path.sigma_dot(t) * noise


@dataclass
class Oracle:
    """The expert of one Gaussian; counts what it is asked."""

    mean: Tensor
    deviation: float
    calls: int = 0
    rows: int = 0
    null_rows: int = 0
    latent_shape: tuple[int, ...] = (2,)

    def velocity(self, noised: Tensor, t: Tensor, condition: Condition, path: NoiseSchedule) -> Tensor:
        self.calls += 1
        self.rows += len(noised)
        self.null_rows += int((condition.class_id < 0).sum())
        return gaussian_velocity(noised, t, self.mean.to(noised), self.deviation, path)

    def to(self, device: torch.device | str) -> "Oracle":
        return self

    def save(self, folder: Path) -> None:
        raise NotImplementedError("an oracle lives in memory")


@dataclass
class OracleRouter:
    """The exact posterior of the component; class c allows the clusters of `allowed[c]` only."""

    means: Tensor
    deviations: Sequence[float]
    shares: Sequence[float]
    noise_schedule: NoiseSchedule = RECTIFIED_FLOW
    allowed: Sequence[Sequence[int]] = ()
    calls: int = 0

    @property
    def num_experts(self) -> int:
        return len(self.shares)

    def logits(self, noised: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.calls += 1
        t = expand(t, noised)
        alpha, sigma = self.noise_schedule.alpha(t), self.noise_schedule.sigma(t)
        columns = []
        for mean, deviation in zip(self.means.to(noised), self.deviations, strict=True):
            variance = alpha**2 * deviation**2 + sigma**2
            distance = ((noised - alpha * mean) ** 2).sum(1, keepdim=True) / variance
            columns.append(-(distance + noised.shape[1] * torch.log(2 * math.pi * variance)) / 2)
        return torch.cat(columns, dim=1) + self.prior_logits(condition).to(noised)

    def prior_logits(self, condition: Condition, present: Tensor | None = None) -> Tensor:
        priors = torch.tensor(list(self.shares), dtype=torch.float64).repeat(len(condition), 1)
        for row, class_id in enumerate(condition.class_id.tolist()):
            if class_id >= 0 and self.allowed:
                silent = [k for k in range(self.num_experts) if k not in self.allowed[class_id]]
                priors[row, silent] = 0
        return (priors if present is None else priors * present).log()

    def to(self, device: torch.device | str) -> "OracleRouter":
        return self

    def save(self, folder: Path) -> None:
        raise NotImplementedError("an oracle lives in memory")


@dataclass
class MixtureOfGaussians:
    """Components on a ring; `shares` are the clusters' true proportions."""

    shares: Sequence[float]
    deviation: float = 0.25
    radius: float = 2.0
    allowed: Sequence[Sequence[int]] = ()
    means: Tensor = field(init=False)

    def __post_init__(self) -> None:
        angles = torch.arange(len(self.shares), dtype=torch.float64) * (2 * math.pi / len(self.shares))
        self.means = self.radius * torch.stack([angles.cos(), angles.sin()], dim=1)

    def experts(self) -> dict[int, Oracle]:
        return {k: Oracle(mean, self.deviation) for k, mean in enumerate(self.means)}

    def router(self, path: NoiseSchedule = RECTIFIED_FLOW) -> OracleRouter:
        deviations = [self.deviation] * len(self.shares)
        return OracleRouter(self.means, deviations, self.shares, path, self.allowed)

    def marginal_velocity(self, noised: Tensor, t: Tensor, path: NoiseSchedule) -> Tensor:
        """The mixture's own velocity, from the score of its density by automatic differentiation.

        u = alpha'/alpha x - (sigma' sigma - alpha'/alpha sigma^2) score (Lipman et al. 2024, arXiv:2412.06264).
        """
        x = noised.clone().requires_grad_()
        a, s = path.alpha(expand(t, x)), path.sigma(expand(t, x))
        variance = a**2 * self.deviation**2 + s**2
        exponents = [
            math.log(share) - ((x - a * mean) ** 2).sum(1, keepdim=True) / (2 * variance)
            for share, mean in zip(self.shares, self.means, strict=True)
        ]
        density = torch.cat(exponents, 1).logsumexp(1, keepdim=True)
        (score,) = torch.autograd.grad(density.sum(), x)
        drift = path.alpha_dot(expand(t, x)) / a
        return drift * noised - (path.sigma_dot(expand(t, x)) * s - drift * s**2) * score

    def nearest(self, samples: Tensor) -> Counter[int]:
        """How many samples lie nearest to each component."""
        return Counter(torch.cdist(samples.double(), self.means).argmin(1).tolist())


@dataclass
class IdentityCodec:
    """Latents of two numbers, shown as an image of 1 x 2 grey pixels."""

    latent_shape: tuple[int, ...] = (2,)

    def decode(self, latents: Tensor) -> Tensor:
        return latents.reshape(len(latents), 1, 2, 1)

    def encode(self, images: object) -> Tensor:
        raise NotImplementedError("nothing is encoded here")

    def save(self, folder: Path) -> None:
        raise NotImplementedError("it lives in memory")
