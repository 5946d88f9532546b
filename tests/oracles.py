"""Exact experts and routers in closed form: a mixture of Gaussians, one component per cluster."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from experts.conditions.condition import Condition
from experts.diffusion.noise_schedule import RECTIFIED_FLOW, NoiseSchedule, expand
from experts.expert_model import ExpertModel


def gaussian_velocity(
    noised: Tensor, t: Tensor, mean: Tensor, deviation: float, noise_schedule: NoiseSchedule
) -> Tensor:
    """Return E[alpha' clean + sigma' noise | noised] for clean ~ N(mean, deviation^2)."""
    t = expand(t, noised)
    alpha, sigma = noise_schedule.alpha(t), noise_schedule.sigma(t)
    variance = alpha**2 * deviation**2 + sigma**2
    residual = noised - alpha * mean
    clean = mean + alpha * deviation**2 / variance * residual
    noise = sigma / variance * residual
    return noise_schedule.alpha_dot(t) * clean + noise_schedule.sigma_dot(t) * noise


@dataclass
class Oracle(ExpertModel):
    """The exact expert of one Gaussian; it counts its calls."""

    mean: Tensor
    deviation: float
    calls: int = 0
    rows: int = 0
    null_rows: int = 0
    latent_shape: tuple[int, ...] = (2,)

    def velocity(self, noised: Tensor, t: Tensor, condition: Condition, noise_schedule: NoiseSchedule) -> Tensor:
        self.calls += 1
        self.rows += len(noised)
        self.null_rows += int((condition.class_id < 0).sum())
        return gaussian_velocity(noised, t, self.mean.to(noised), self.deviation, noise_schedule)

    def to(self, device: torch.device | str) -> "Oracle":
        return self

    def save(self, folder: Path) -> None:
        raise NotImplementedError("an oracle cannot be saved")


@dataclass
class OracleRouter:
    """The exact posterior of the components; class c is restricted to the clusters in `allowed[c]`."""

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
                excluded = [k for k in range(self.num_experts) if k not in self.allowed[class_id]]
                priors[row, excluded] = 0
        return (priors if present is None else priors * present).log()

    def to(self, device: torch.device | str) -> "OracleRouter":
        return self

    def save(self, folder: Path) -> None:
        raise NotImplementedError("an oracle cannot be saved")


@dataclass
class MixtureOfGaussians:
    """Components on a ring; `shares` are the proportions of the clusters."""

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

    def router(self, noise_schedule: NoiseSchedule = RECTIFIED_FLOW) -> OracleRouter:
        deviations = [self.deviation] * len(self.shares)
        return OracleRouter(self.means, deviations, self.shares, noise_schedule, self.allowed)

    def marginal_velocity(self, noised: Tensor, t: Tensor, noise_schedule: NoiseSchedule) -> Tensor:
        """Compute the velocity of the mixture from the score of its density, by automatic differentiation.

        u = alpha'/alpha x - (sigma' sigma - alpha'/alpha sigma^2) score (Lipman et al. 2024, arXiv:2412.06264).
        """
        x = noised.clone().requires_grad_()
        a, s = noise_schedule.alpha(expand(t, x)), noise_schedule.sigma(expand(t, x))
        variance = a**2 * self.deviation**2 + s**2
        exponents = [
            math.log(share) - ((x - a * mean) ** 2).sum(1, keepdim=True) / (2 * variance)
            for share, mean in zip(self.shares, self.means, strict=True)
        ]
        density = torch.cat(exponents, 1).logsumexp(1, keepdim=True)
        (score,) = torch.autograd.grad(density.sum(), x)
        drift = noise_schedule.alpha_dot(expand(t, x)) / a
        return drift * noised - (noise_schedule.sigma_dot(expand(t, x)) * s - drift * s**2) * score

    def nearest(self, samples: Tensor) -> Counter[int]:
        """Count the samples that are nearest to each component."""
        return Counter(torch.cdist(samples.double(), self.means).argmin(1).tolist())


@dataclass
class IdentityCodec:
    """Latents of two numbers, shown as an image of 1 x 2 grey pixels."""

    latent_shape: tuple[int, ...] = (2,)
    image_shape: tuple[int, int, int] = (1, 2, 1)

    def with_size(self, height: int, width: int) -> "IdentityCodec":
        return self

    def decode(self, latents: Tensor) -> Tensor:
        return latents.reshape(len(latents), 1, 2, 1)

    def encode(self, images: object) -> Tensor:
        raise NotImplementedError("this codec cannot encode")

    def save(self, folder: Path) -> None:
        raise NotImplementedError("this codec cannot be saved")
