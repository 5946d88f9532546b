"""Expected calibration error: the difference between the probability of the best expert and its accuracy."""

from typing import Final

import torch
from jaxtyping import Float, Int
from torch import Tensor

CELLS: Final = 15
"""Cells of equal width in the probability of the most probable expert. Cells of equal mass would split equal
probabilities, of which there are many near t = 1."""
FLOOR_DRAWS: Final = 20

Probabilities = Float[Tensor, "row expert"]


def calibration_error(probability: Probabilities, cluster_id: Int[Tensor, " row"]) -> float:
    """Compute the mean difference between probability and accuracy over the cells, from 0 to 1."""
    confidence, best = probability.double().max(-1)
    return float(_error(confidence, (best == cluster_id).double()))


def calibration_error_floor(probability: Probabilities, repeats: int, seed: int) -> float:
    """Estimate the average error of a perfectly calibrated router with these outputs and number of rows.

    The rows are `repeats` blocks of the same images. Each image has one cluster, so one uniform number per image draws
    it in all blocks.
    """
    probability = probability.double()
    confidence, best = probability.max(-1)
    upper = probability.cumsum(-1).gather(-1, best.unsqueeze(-1)).squeeze(-1)
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(FLOOR_DRAWS, len(probability) // repeats, generator=generator, dtype=torch.float64)
    hits = [(uniform >= upper - confidence) & (uniform < upper) for uniform in uniforms.repeat(1, repeats)]
    return sum(float(_error(confidence, hit.double())) for hit in hits) / FLOOR_DRAWS


def _error(confidence: Float[Tensor, " row"], is_hit: Float[Tensor, " row"]) -> Float[Tensor, ""]:
    # Guo et al. 2017, arXiv:1706.04599, equation (3): sum over cells of |B| / n |accuracy(B) - confidence(B)|.
    cell = ((confidence * CELLS).ceil().long() - 1).clamp(0, CELLS - 1)
    gaps = torch.zeros(CELLS, dtype=torch.float64).index_add(0, cell, is_hit - confidence)
    return gaps.abs().sum() / len(confidence)
