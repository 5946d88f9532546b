"""Which noise goes with which sample: the assignment of least squared distance within a batch.

Pooladian et al. 2023, arXiv:2304.14772 (minibatch optimal transport); in latent consistency training, Dao et al. 2025,
arXiv:2502.01441. Rows of unlike conditions never exchange noise: it would then tell the condition.
"""

import torch
from jaxtyping import Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from experts.noise_path import Latents


def coupled(clean: Latents, noise: Latents, group: Int[Tensor, " batch"]) -> Latents:
    """The rows of `noise` in the order that brings them nearest to `clean`, within rows of equal `group`."""
    order = torch.arange(len(clean))
    costs = torch.cdist(clean.flatten(1).double(), noise.flatten(1).double()).square().cpu()
    for value in torch.unique(group).tolist():
        rows = (group == value).nonzero().squeeze(-1).cpu()
        _, columns = linear_sum_assignment(costs[rows][:, rows].numpy())
        order[rows] = rows[torch.from_numpy(columns)]
    return noise[order.to(noise.device)]
