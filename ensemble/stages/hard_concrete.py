"""Gates between 0 and 1 that can be learned although they end up shut or open.

Louizos, Welling & Kingma 2018, arXiv:1712.01312, section 2.2: noise u moves a logit, a sigmoid of temperature BETA
brings it between 0 and 1, and what was stretched beyond both is cut off there, so that 0 and 1 have mass.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

GAMMA, ZETA, BETA = -0.1, 1.1, 0.83
"""Ends of the stretched interval, and the temperature."""

Gate = Float[Tensor, " unit"]


def hard_concrete(logits: Gate, uniform: Gate) -> Gate:
    """Gates in [0, 1] of logits and of noise in (0, 1); noise of 1/2 everywhere is no noise."""
    # s = sigmoid((log u - log(1 - u) + logit) / beta),  gate = min(1, max(0, s (zeta - gamma) + gamma))
    concrete = torch.sigmoid((torch.logit(uniform) + logits) / BETA)
    return (concrete * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


class Gates(nn.Module):
    """A logit for each of `count` units."""

    def __init__(self, count: int, start: float, noise: float) -> None:
        """`noise` in [0, 1) is the width of the interval around 1/2 that u is drawn from."""
        super().__init__()
        self.logits = nn.Parameter(torch.full((count,), start))
        self.noise = noise

    def forward(self) -> Gate:
        """One draw of all gates, from torch's global generator."""
        uniform = 0.5 + self.noise * (torch.rand_like(self.logits) - 0.5)
        return hard_concrete(self.logits, uniform)
