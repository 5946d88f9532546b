"""Temperatures that make a router's probabilities true: one per bin of t, with the condition and without.

Gates are mixing coefficients, so that it is not enough for the right expert to be the most probable one. A positive
temperature never changes which expert that is.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from experts.condition import Condition
from experts.latents import LatentDataset
from experts.noise_path import NoisePath
from router.answers import Answers, Speak, ask
from router.t_bins import BINS, at_t, fit_logarithms

Logits = Float[Tensor, "batch expert"]
Temperatures = Float[Tensor, "branch bin"]
"""Of rows with a condition, then of null rows."""


def no_temperatures() -> Temperatures:
    """One everywhere, which changes no bit of any logit."""
    return torch.ones(2, BINS, dtype=torch.float64)


def cooled(logits: Logits, temperatures: Temperatures, t: Float[Tensor, " batch"], condition: Condition) -> Logits:
    """The logits of every row divided by its temperature, whose logarithm is linear between the bins' middles."""
    # Guo et al. 2017, arXiv:1706.04599, equation (9): softmax(z / T), here with T = T(t).
    is_null = (condition.class_id < 0).long().to(t.device)
    rows = temperatures.to(t.device).log()[is_null]
    return logits / at_t(rows, t).exp().to(logits.dtype).unsqueeze(-1)


def fit_temperatures(speak: Speak, held_out: LatentDataset, path: NoisePath) -> Temperatures:
    """The temperatures of least cross-entropy on samples that the router has not learned from; repeatable."""
    return torch.stack([fit_branch(ask(speak, held_out, path, is_told=is_told)) for is_told in (True, False)])


def fit_branch(answers: Answers) -> Float[Tensor, " bin"]:
    """The temperatures of one branch, from what was answered to its rows."""

    def loss(logarithms: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
        return functional.cross_entropy(answers.said / logarithms.exp().unsqueeze(-1), answers.cluster_id)

    return fit_logarithms(loss, answers.t).exp()
