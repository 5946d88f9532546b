"""The velocity field of a pipeline's call: the ensemble's, guided away from a negative condition or a weak ensemble."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ensemble.ensemble import Ensemble
from ensemble.pipeline_folder import PipelineError
from ensemble.routing import RoutingState, TrajectoryState
from experts.conditions.condition import Condition
from experts.types import Latents

GUIDERS = (
    "ClassifierFreeGuidance",
    "ClassifierFreeZeroStarGuidance",
    "AdaptiveProjectedGuidance",
    "TangentialClassifierFreeGuidance",
    "MagnitudeAwareGuidance",
    "FrequencyDecoupledGuidance",
)
"""Guiders of diffusers that combine two velocities; the others change the layers of one network."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """How far, when and from what a velocity is guided away."""

    scale: float = 1.0
    """other + scale * (conditional - other); 1 is none."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Smallest and largest t with guidance; outside, the conditional velocity alone is evaluated."""
    guider: Any = None
    """One of `diffusers.guiders`, which replaces scale and interval; None is classifier-free guidance."""
    weak: Ensemble | None = None
    """The weak ensemble of autoguidance, which replaces the negative condition."""

    def __post_init__(self) -> None:
        """Raise `PipelineError` for a guider that changes layers, or an interval outside [0, 1]."""
        if self.guider is not None and type(self.guider).__name__ not in GUIDERS:
            raise PipelineError(
                f"{type(self.guider).__name__} changes the layers of one network, and an ensemble has several; "
                f"use one of {', '.join(GUIDERS)}, or weak= for autoguidance"
            )
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise PipelineError(f"guidance_interval is the smallest and the largest t, from 0 to 1; got {low}, {high}")

    def is_active(self, t: float, step: int, steps: int) -> bool:
        """Return whether the velocity at this step is guided."""
        if self.guider is None:
            return self.scale != 1 and self.interval[0] <= t <= self.interval[1]
        self.guider.set_state(step=step, num_inference_steps=steps, timestep=torch.tensor(t))
        self.guider.prepare_inputs({})  # guiders with momentum reset it here
        return bool(self.guider.num_conditions > 1)

    def apply(self, conditional: Latents, other: Latents) -> Latents:
        """Return the guided velocity."""
        if self.guider is None:
            return other + self.scale * (conditional - other)
        guided: Latents = self.guider.forward(conditional, other).pred
        return guided


@dataclass(slots=True, kw_only=True)
class GuidedField:
    """Velocity field of one batch of trajectories; both conditions go through the ensemble as one batch."""

    ensemble: Ensemble
    condition: Condition
    negative: Condition
    routing: RoutingState
    """Of two branches if the negative condition is evaluated, else of one."""
    guidance: Guidance
    weak_routing: RoutingState | None = None
    steps: int = field(default=0)
    """Number of evaluations of a trajectory."""

    @classmethod
    def start(
        cls, ensemble: Ensemble, condition: Condition, negative: Condition, routing: RoutingState, guidance: Guidance
    ) -> "GuidedField":
        """Start trajectories whose experts have been drawn; `routing` has one branch."""
        in_one_call = ensemble.guides_in_one_call and guidance.guider is None
        has_negative = guidance.weak is None and (
            guidance.guider is not None or (guidance.scale != 1 and not in_one_call)
        )
        weak = guidance.weak
        weak_routing = None if weak is None else weak.init_routing(routing.seeds, condition, routing.selection)
        routing = routing.repeat(2) if has_negative else routing
        routing.calls.weak = None if weak_routing is None else weak_routing.calls
        return cls(
            ensemble=ensemble,
            condition=condition,
            negative=negative,
            routing=routing,
            guidance=guidance,
            weak_routing=weak_routing,
        )

    def velocity(self, noised: Latents, t: float, step: int) -> Latents:
        """Return the velocity of all rows at t, evaluation number `step`."""
        times = torch.full((len(noised),), t, device=noised.device)
        self.routing.calls.evaluations += len(noised)
        guidance = self.guidance
        if not guidance.is_active(t, step, self.steps):
            return self._conditional(noised, times)
        if guidance.weak is not None and self.weak_routing is not None:
            weak = guidance.weak.velocity(noised, times, self.condition, self.weak_routing)
            return guidance.apply(self._conditional(noised, times), weak)
        if self.routing.branches == 1:
            condition = self.condition.guided(guidance.scale, self.negative)
            return self.ensemble.velocity(noised, times, condition, self.routing)
        both = self.ensemble.velocity(
            torch.cat([noised, noised]),
            torch.cat([times, times]),
            Condition.concatenate([self.condition, self.negative]),
            self.routing,
        )
        return guidance.apply(*both.chunk(2))

    def _conditional(self, noised: Latents, times: Float[Tensor, " batch"]) -> Latents:
        """Return the velocity of the condition alone; the other branch continues with its gates."""
        if self.routing.branches == 1:
            return self.ensemble.velocity(noised, times, self.condition, self.routing)
        single = _first_branch(self.routing)
        velocity = self.ensemble.velocity(noised, times, self.condition, single)
        for name in ("gates", "probability", "is_frozen", "evaluations"):
            setattr(self.routing.state, name, getattr(single.state.repeat(self.routing.branches), name))
        return velocity

    @property
    def gates(self) -> Float[Tensor, "batch expert"]:
        """Return the gates of the conditional branch; raise `ValueError` before there are any."""
        return self.routing.gates[: len(self.condition)]


def _first_branch(routing: RoutingState) -> RoutingState:
    """Return the state of the branch with the condition; calls and caches stay shared."""
    state, count = routing.state, len(routing.seeds) // routing.branches
    first = TrajectoryState(
        gates=None if state.gates is None else state.gates[:count],
        probability=None if state.probability is None else state.probability[:count],
        is_frozen=None if state.is_frozen is None else state.is_frozen[:count],
        evaluations=state.evaluations,
    )
    return replace(routing, seeds=routing.seeds[:count], branches=1, state=first)
