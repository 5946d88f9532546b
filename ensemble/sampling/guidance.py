"""Classifier-free guidance, and weak-to-strong reflection of solver steps.

    noised ──strong, t to t'──► ahead ──weak, t' to t──► reflected ──plain step of the strong──► …

To first order a reflection moves a sample at t by (t' - t) (u_strong - u_weak): further along the difference of the
strong and the weak velocity. This difference approximates that of an even better model and the strong one (W2SD, Bai et
al. 2025, arXiv:2502.00473). Any two velocity fields work: an ensemble and one of its experts, a model and an early
checkpoint of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from ensemble.config import Solver
from ensemble.ensemble import Ensemble
from ensemble.routing import RoutingState
from ensemble.solvers import SOLVERS, STEPS, Latents, TimeGrid, VelocityField, euler_step
from experts.conditions.condition import Condition

Times = Float[Tensor, " batch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GuidedVelocity:
    """Velocity field of one batch of trajectories; both branches of guidance go through the ensemble as one batch."""

    ensemble: Ensemble
    condition: Condition
    """Of every row, the rows of the unconditional branch included."""
    routing: RoutingState
    guidance_scale: float
    """1 for no unconditional branch."""
    on_evaluation: Callable[[Latents, Times], None] | None = None
    """Called before every evaluation."""

    def __call__(self, noised: Latents, t: Times) -> Latents:
        """Return the velocity at t."""
        if self.on_evaluation is not None:
            self.on_evaluation(noised, t)
        if self.guidance_scale == 1:
            return self.ensemble.velocity(noised, t, self.condition, self.routing)
        both = self.ensemble.velocity(torch.cat([noised, noised]), torch.cat([t, t]), self.condition, self.routing)
        conditional, unconditional = both.chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)


def guided_velocity(
    ensemble: Ensemble,
    condition: Condition,
    routing: RoutingState,
    guidance_scale: float,
    on_evaluation: Callable[[Latents, Times], None] | None = None,
    negative: Condition | None = None,
) -> GuidedVelocity:
    """Build the velocity field of these trajectories; a scale of 1 never evaluates the unconditional branch.

    `negative` is the condition of that branch; None is the null condition. Experts that guide in one call get both with
    the condition.
    """
    if guidance_scale != 1 and ensemble.guides_in_one_call:
        condition, guidance_scale = condition.guided(guidance_scale, negative), 1.0
    if guidance_scale != 1:
        negative = negative or Condition.null(len(condition), condition.class_id.device)
        condition = Condition.concatenate([condition, negative])
        routing = routing.repeat(2)
    return GuidedVelocity(
        ensemble=ensemble,
        condition=condition,
        routing=routing,
        guidance_scale=guidance_scale,
        on_evaluation=on_evaluation,
    )


def reflection_step(strong: VelocityField, weak: VelocityField, noised: Latents, t: float, t_next: float) -> Latents:
    """Step from t to `t_next` with the strong velocity, and back to t with the weak one.

    The way back is Euler's rule reversed, evaluated at `t_next`: equal fields return to the start up to O((t - t')^2).
    """
    return euler_step(weak, euler_step(strong, noised, t, t_next), t_next, t)


def reflected_solver(
    solver: Solver, strong: VelocityField, weak: VelocityField, steps: int | None
) -> Callable[[VelocityField, Latents, TimeGrid], Latents]:
    """Return the solver with its first `steps` steps reflected, None for all.

    The last step never is: the velocity may not exist at 0.

    `strong` and the velocity that the solver is called with are the same field; they may count calls separately.
    """
    solver_step = STEPS[solver]

    def solve(velocity: VelocityField, noise: Latents, times: TimeGrid) -> Latents:
        reflected = min(len(times) - 2 if steps is None else steps, len(times) - 2)
        noised = noise
        for t, t_next in pairwise(times[: reflected + 1].tolist()):
            noised = solver_step(velocity, reflection_step(strong, weak, noised, t, t_next), t, t_next)
        return SOLVERS[solver](velocity, noised, times[reflected:])

    return solve
