"""Whom a student learns from: an expert, or all of them at once.

u(x, t | c) = sum_k p(k | x, t, c) u_k(x, t | c)      McAllister et al. 2025, arXiv:2501.05450, equation (7)
"""

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ensemble.compression.method import StageError
from ensemble.ensemble import Ensemble, RouterModel
from experts.condition import Condition
from experts.diffusion.noise_schedule import Latents, NoiseSchedule, Times, expand
from experts.expert import Expert
from experts.training.flops import forward_flops
from experts.training.trainer import usable_device


@runtime_checkable
class Teacher(Protocol):
    """Anything with a velocity on a path of its own."""

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """The noise path that it speaks on."""

    def velocity(self, noised: Latents, t: Times, condition: Condition) -> Latents:
        """Its velocity; differentiable by `noised`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsembleTeacher:
    """All experts of an ensemble, weighed by its router as the equation says; every call asks every expert."""

    ensemble: Ensemble

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """The ensemble's."""
        return self.ensemble.noise_schedule

    def velocity(self, noised: Latents, t: Times, condition: Condition) -> Latents:
        """The marginal velocity."""
        said: Tensor = torch.zeros_like(noised)
        gates = _posterior(self.ensemble).logits(noised, t, condition).softmax(-1)
        for k, expert in self.ensemble.experts.items():
            said = said + expand(gates[:, k], noised) * expert.velocity(noised, t, condition, self.noise_schedule)
        return said


def ensemble_teacher(ensemble: Ensemble, device: str) -> EnsembleTeacher:
    """A frozen copy of an ensemble of which none is missing, on a device; `StageError` for another one."""
    if ensemble.missing or ensemble.router is None:
        raise StageError(
            f"one student of all learns from an ensemble with a router and no expert missing; missing here: "
            f"{list(ensemble.missing) or 'the router'}; take distill.students=per_expert"
        )
    copied = deepcopy(ensemble).to(usable_device(device))
    for part in (*copied.experts.values(), copied.router):
        model = getattr(part, "model", None)
        if isinstance(model, torch.nn.Module):
            model.eval().requires_grad_(False)
    return EnsembleTeacher(ensemble=copied)


def router_flops(teacher: EnsembleTeacher, latent_shape: tuple[int, ...]) -> float:
    """Of the router's call on a row."""
    row, t = torch.zeros(1, *latent_shape), torch.full((1,), 0.5)
    return forward_flops(lambda: deepcopy(_posterior(teacher.ensemble)).to("cpu").logits(row, t, Condition.null(1)))


def frozen_copy(expert: Expert, device: str) -> Expert:
    """A copy of an expert that learns nothing, on a device."""
    model = deepcopy(expert.model).to(usable_device(device)).eval().requires_grad_(False)
    return replace(expert, model=model, cache=None)


def _posterior(ensemble: Ensemble) -> RouterModel:
    if ensemble.router is None:
        raise StageError("a mixture needs a router; take distill.students=per_expert")
    return ensemble.router
