"""Weak-to-strong reflection: a denoising step by the strong, the way back by the weak, then the plain step.

    noised ──strong, t to t'──► ahead ──weak, t' to t──► reflected ──plain step of the strong──► …

To first order this moves a sample at t by (t' - t) (u_strong - u_weak): further along what the strong velocity has
over the weak one, which stands for what a better one still would have over the strong (W2SD, Bai et al. 2025,
arXiv:2502.00473). Any two velocity fields will do: an ensemble and an expert of it, a model and an early state of it.
"""

from collections.abc import Callable
from itertools import pairwise

from ensemble.config import Solver
from ensemble.sampler import SOLVERS, STEPS, Latents, Schedule, VelocityField, euler_step


def reflect(strong: VelocityField, weak: VelocityField, noised: Latents, t: float, t_next: float) -> Latents:
    """Where the sample would be at t if the weak velocity had led to where the strong one leads.

    The way back is Euler's rule run backwards, from t' at t': equal fields come back but for O((t - t')^2).
    """
    return euler_step(weak, euler_step(strong, noised, t, t_next), t_next, t)


def reflecting(
    solver: Solver, strong: VelocityField, weak: VelocityField, steps: int
) -> Callable[[VelocityField, Latents, Schedule], Latents]:
    """The solver with its first `steps` steps reflected, but never the last: at t = 0 nothing need have a velocity.

    `strong` and the velocity that the solver is called with are the same field; they may be counted apart.
    """
    step = STEPS[solver]

    def solve(velocity: VelocityField, noise: Latents, times: Schedule) -> Latents:
        first = min(steps, len(times) - 2)
        noised = noise
        for t, t_next in pairwise(times[: first + 1].tolist()):
            noised = step(velocity, reflect(strong, weak, noised, t, t_next), t, t_next)
        return SOLVERS[solver](velocity, noised, times[first:])

    return solve
