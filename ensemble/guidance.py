"""Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) over an ensemble.

    u = u_unc + s (u_cond - u_unc)
    u_unc = sum_k p(k | x, t) u_k(x, t)        u_cond = sum_k p(k | x, t, c) u_k(x, t | c)

Each branch has gates of its own, and both go through the experts in one call. Where a selection has drawn one expert
for the trajectory, both branches have that one, drawn for the condition: there guidance happens inside one expert.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ensemble.ensemble import Ensemble
from ensemble.routing import Routing
from ensemble.sampler import VelocityField
from experts.condition import Condition

Latents = Float[Tensor, "batch *latent"]
Times = Float[Tensor, " batch"]


def guided(ensemble: Ensemble, condition: Condition, routing: Routing, guidance_scale: float) -> VelocityField:
    """The velocity field of these trajectories; a scale of 1 never evaluates the unconditional branch."""
    if guidance_scale == 1:
        return lambda noised, t: ensemble.velocity(noised, t, condition, routing)
    both = Condition.joined([condition, Condition.null(len(condition), condition.class_id.device)])
    twice = routing.repeated(2)

    def velocity(noised: Latents, t: Times) -> Latents:
        stacked = ensemble.velocity(torch.cat([noised, noised]), torch.cat([t, t]), both, twice)
        conditional, unconditional = stacked.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    return velocity
