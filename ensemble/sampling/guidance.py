"""Weak-to-strong reflection: a denoising step by the strong, the way back by the weak, then the plain step.

    noised ──strong, t to t'──► ahead ──weak, t' to t──► reflected ──plain step of the strong──► …

To first order this moves a sample at t by (t' - t) (u_strong - u_weak): further along what the strong velocity has
over the weak one, which stands for what a better one still would have over the strong (W2SD, Bai et al. 2025,
arXiv:2502.00473). Any two velocity fields will do: an ensemble and an expert of it, a model and an early state of it.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from ensemble.config import Solver
from ensemble.ensemble import Ensemble
from ensemble.routing import RoutingState
from ensemble.solvers import SOLVERS, STEPS, Latents, TimeGrid, VelocityField, euler_step
from experts.condition import Condition

Times = Float[Tensor, " batch"]


def guided_velocity(
    ensemble: Ensemble, condition: Condition, routing: RoutingState, guidance_scale: float
) -> VelocityField:
    """The velocity field of these trajectories; a scale of 1 never evaluates the unconditional branch."""
    if guidance_scale == 1:
        return lambda noised, t: ensemble.velocity(noised, t, condition, routing)
    both = Condition.concatenate([condition, Condition.null(len(condition), condition.class_id.device)])
    twice = routing.repeated(2)

    def velocity(noised: Latents, t: Times) -> Latents:
        stacked = ensemble.velocity(torch.cat([noised, noised]), torch.cat([t, t]), both, twice)
        conditional, unconditional = stacked.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    return velocity


def reflection_step(strong: VelocityField, weak: VelocityField, noised: Latents, t: float, t_next: float) -> Latents:
    """Where the sample would be at t if the weak velocity had led to where the strong one leads.

    The way back is Euler's rule run backwards, from t' at t': equal fields come back but for O((t - t')^2).
    """
    return euler_step(weak, euler_step(strong, noised, t, t_next), t_next, t)


def reflected_solver(
    solver: Solver, strong: VelocityField, weak: VelocityField, steps: int
) -> Callable[[VelocityField, Latents, TimeGrid], Latents]:
    """The solver with its first `steps` steps reflected, but never the last: at t = 0 nothing need have a velocity.

    `strong` and the velocity that the solver is called with are the same field; they may be counted apart.
    """
    step = STEPS[solver]

    def solve(velocity: VelocityField, noise: Latents, times: TimeGrid) -> Latents:
        first = min(steps, len(times) - 2)
        noised = noise
        for t, t_next in pairwise(times[: first + 1].tolist()):
            noised = step(velocity, reflection_step(strong, weak, noised, t, t_next), t, t_next)
        return SOLVERS[solver](velocity, noised, times[first:])

    return solve
