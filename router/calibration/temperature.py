"""What a router answers to noised samples of known clusters, at every t: from this, numbers per bin of t are fitted."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from experts.condition import Condition
from experts.diffusion.noise_schedule import NoiseSchedule
from experts.training.latent_dataset import LatentDataset
from router.calibration.time_bins import BINS, at_t, fit_logarithms

ROWS: Final = 2048
"""Noised samples in every bin of t, however many clean ones there are, so that the cost is known before."""
SEED: Final = 17_060_459

Logits = Float[Tensor, "batch expert"]
Latents = Float[Tensor, "batch *latent"]
Times = Float[Tensor, " batch"]
LogitFn = Callable[[Latents, Times, Condition], Logits]
"""(noised, t, condition) to one number per expert."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledLogits:
    """One row for each noised sample."""

    logits: Logits
    """What was answered, in double precision."""
    t: Times
    cluster_id: Int[Tensor, " batch"]
    """The truth."""

    def rows(self, keep: Tensor) -> "LabelledLogits":
        """The chosen rows."""
        return LabelledLogits(logits=self.logits[keep], t=self.t[keep], cluster_id=self.cluster_id[keep])


@torch.no_grad()
def collect_logits(speak: LogitFn, dataset: LatentDataset, path: NoiseSchedule, *, conditional: bool) -> LabelledLogits:
    """Ask about samples spread evenly over `dataset`, at their true proportions; the same ones at every call.

    Told the condition, rows without a class are left out; else the condition is null.
    """
    rows = torch.arange(ROWS) * len(dataset) // ROWS
    clean, class_id = dataset.clean.index_select(0, rows), dataset.class_id.index_select(0, rows)
    condition = Condition(class_id) if conditional else Condition.null(ROWS)
    said, times = [], []
    for index in range(BINS):
        generator = torch.Generator().manual_seed(SEED + index)
        t = (index + torch.rand(ROWS, generator=generator)) / BINS
        noise = torch.randn(clean.shape, generator=generator)
        said.append(speak(path.add_noise(clean, noise, t), t, condition).double())
        times.append(t)
    cluster_id = dataset.cluster_id.index_select(0, rows).repeat(BINS)
    every = LabelledLogits(logits=torch.cat(said), t=torch.cat(times), cluster_id=cluster_id)
    return every.rows(class_id.repeat(BINS) >= 0) if conditional else every


Temperatures = Float[Tensor, "branch bin"]
"""Of rows with a condition, then of null rows."""


def unit_temperatures() -> Temperatures:
    """One everywhere, which changes no bit of any logit."""
    return torch.ones(2, BINS, dtype=torch.float64)


def apply_temperature(
    logits: Logits, temperatures: Temperatures, t: Float[Tensor, " batch"], condition: Condition
) -> Logits:
    """The logits of every row divided by its temperature, whose logarithm is linear between the bins' middles."""
    # Guo et al. 2017, arXiv:1706.04599, equation (9): softmax(z / T), here with T = T(t).
    is_null = (condition.class_id < 0).long().to(t.device)
    rows = temperatures.to(t.device).log()[is_null]
    return logits / at_t(rows, t).exp().to(logits.dtype).unsqueeze(-1)


def fit_temperatures(speak: LogitFn, held_out: LatentDataset, path: NoiseSchedule) -> Temperatures:
    """The temperatures of least cross-entropy on samples that the router has not learned from; repeatable."""
    return torch.stack(
        [fit_branch(collect_logits(speak, held_out, path, conditional=is_told)) for is_told in (True, False)]
    )


def fit_branch(answers: LabelledLogits) -> Float[Tensor, " bin"]:
    """The temperatures of one branch, from what was answered to its rows."""

    def loss(logarithms: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
        return functional.cross_entropy(answers.logits / logarithms.exp().unsqueeze(-1), answers.cluster_id)

    return fit_logarithms(loss, answers.t).exp()
