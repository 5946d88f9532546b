"""Teachers of a student: a single expert, or the velocity of the whole ensemble.

u(x, t | c) = sum_k p(k | x, t, c) u_k(x, t | c)      McAllister et al. 2025, arXiv:2501.05450, equation (7)
"""

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ensemble.compression.method import StageError
from ensemble.ensemble import Ensemble, RouterModel
from experts.conditions.condition import Condition
from experts.diffusion.noise_schedule import NoiseSchedule, expand, to_schedule
from experts.expert import Expert, network_flops
from experts.training.flops import forward_flops
from experts.training.trainer import check_device
from experts.types import Latents, Times


@runtime_checkable
class Teacher(Protocol):
    """Model with a velocity on its own noise schedule."""

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """Return the noise schedule of its velocity."""

    def velocity(
        self, noised: Latents, t: Times, condition: Condition, noise_schedule: NoiseSchedule | None = None
    ) -> Latents:
        """Return the velocity on `noise_schedule` (default: its own); differentiable with respect to `noised`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsembleTeacher:
    """All experts of an ensemble, weighted by its router as in the equation; every call evaluates every expert."""

    ensemble: Ensemble

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """Return the ensemble's noise schedule."""
        return self.ensemble.noise_schedule

    def velocity(
        self, noised: Latents, t: Times, condition: Condition, noise_schedule: NoiseSchedule | None = None
    ) -> Latents:
        """Return the marginal velocity."""
        noise_schedule = noise_schedule or self.noise_schedule
        velocity: Tensor = torch.zeros_like(noised)
        at_router = to_schedule(noised, t, noise_schedule, self.noise_schedule)
        gates = _router(self.ensemble).logits(at_router.noised, at_router.t, condition).softmax(-1)
        for k, expert in self.ensemble.experts.items():
            velocity = velocity + expand(gates[:, k], noised) * expert.velocity(noised, t, condition, noise_schedule)
        return velocity


def build_ensemble_teacher(ensemble: Ensemble, device: str) -> EnsembleTeacher:
    """Copy a complete ensemble to a device and freeze it; raise `StageError` if an expert or the router is missing."""
    if ensemble.missing or ensemble.router is None:
        raise StageError(
            f"a shared student needs an ensemble with a router and all experts; missing: "
            f"{list(ensemble.missing) or 'the router'}; set distill.students=per_expert"
        )
    copy = deepcopy(ensemble).to(check_device(device))
    for part in (*copy.experts.values(), copy.router):
        model = getattr(part, "model", None)
        if isinstance(model, torch.nn.Module):
            model.eval().requires_grad_(False)
    return EnsembleTeacher(ensemble=copy)


def router_flops(teacher: EnsembleTeacher, latent_shape: tuple[int, ...]) -> float:
    """Return the FLOPs of the router on one row."""
    row, t = torch.zeros(1, *latent_shape), torch.full((1,), 0.5)
    return forward_flops(lambda: deepcopy(_router(teacher.ensemble)).to("cpu").logits(row, t, Condition.null(1)))


def copy_frozen(expert: Expert, device: str) -> Expert:
    """Copy an expert to a device and freeze it."""
    model = deepcopy(expert.model).to(check_device(device)).eval().requires_grad_(False)
    return replace(expert, model=model, cache=None)


def copy_as_teacher(expert: Expert, device: str) -> tuple[Expert, float]:
    """Return a frozen copy of an expert, and its FLOPs on one row: the teacher of its own student."""
    return copy_frozen(expert, device), network_flops(expert.model, expert.latent_shape)


def _router(ensemble: Ensemble) -> RouterModel:
    if ensemble.router is None:
        raise StageError("a shared student needs an ensemble with a router; set distill.students=per_expert")
    return ensemble.router
