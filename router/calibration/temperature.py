"""Temperatures of a router, fitted per bin of t to its logits on noised samples of known clusters."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from experts.conditions.condition import Condition
from experts.diffusion.noise_schedule import NoiseSchedule
from experts.training.latent_dataset import LatentDataset
from router.calibration.time_bins import BINS, fit_logarithms, interpolate

ROWS_PER_BIN: Final = 2048
"""Number of noised samples per bin of t, independent of the number of clean ones, so the cost is known in advance."""
SEED: Final = 17_060_459

Logits = Float[Tensor, "batch expert"]
Latents = Float[Tensor, "batch *latent"]
Times = Float[Tensor, " batch"]
LogitFn = Callable[[Latents, Times, Condition], Logits]
"""(noised, t, condition) -> one number per expert."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabeledLogits:
    """Logits of noised samples with their t and true cluster, one row per sample."""

    logits: Logits
    """Logits in double precision."""
    t: Times
    cluster_id: Int[Tensor, " batch"]
    """True cluster."""

    def rows(self, keep: Tensor) -> "LabeledLogits":
        """Return the selected rows."""
        return LabeledLogits(logits=self.logits[keep], t=self.t[keep], cluster_id=self.cluster_id[keep])


@torch.no_grad()
def collect_logits(
    logit_fn: LogitFn, dataset: LatentDataset, noise_schedule: NoiseSchedule, *, conditional: bool
) -> LabeledLogits:
    """Evaluate `logit_fn` on samples spread evenly over `dataset`, at true proportions; the same samples at every call.

    With `conditional`, rows without a class are omitted; otherwise the condition is null.
    """
    rows = torch.arange(ROWS_PER_BIN) * len(dataset) // ROWS_PER_BIN
    clean = dataset.clean_rows(rows)
    condition = dataset.condition(rows) if conditional else Condition.null(ROWS_PER_BIN)
    logits, times = [], []
    for index in range(BINS):
        generator = torch.Generator().manual_seed(SEED + index)
        t = (index + torch.rand(ROWS_PER_BIN, generator=generator)) / BINS
        noise = torch.randn(clean.shape, generator=generator)
        logits.append(logit_fn(noise_schedule.add_noise(clean, noise, t), t, condition).double())
        times.append(t)
    cluster_id = dataset.cluster_id.index_select(0, rows).repeat(BINS)
    labeled = LabeledLogits(logits=torch.cat(logits), t=torch.cat(times), cluster_id=cluster_id)
    return labeled.rows(~condition.is_null.repeat(BINS)) if conditional else labeled


Temperatures = Float[Tensor, "branch bin"]
"""First row: with a condition; second row: null condition."""


def unit_temperatures() -> Temperatures:
    """Return ones, which change no bit of any logit."""
    return torch.ones(2, BINS, dtype=torch.float64)


def apply_temperature(
    logits: Logits, temperatures: Temperatures, t: Float[Tensor, " batch"], condition: Condition
) -> Logits:
    """Divide the logits of every row by its temperature, whose logarithm is linear between the centers of the bins."""
    # Guo et al. 2017, arXiv:1706.04599, equation (9): softmax(z / T), here with T = T(t).
    is_null = condition.is_null.long().to(t.device)
    rows = temperatures.to(t.device).log()[is_null]
    return logits / interpolate(rows, t).exp().to(logits.dtype).unsqueeze(-1)


def fit_temperatures(logit_fn: LogitFn, held_out: LatentDataset, noise_schedule: NoiseSchedule) -> Temperatures:
    """Fit the temperatures of least cross-entropy on samples outside the router's training; deterministic."""
    return torch.stack(
        [
            fit_branch(collect_logits(logit_fn, held_out, noise_schedule, conditional=conditional))
            for conditional in (True, False)
        ]
    )


def fit_branch(labeled: LabeledLogits) -> Float[Tensor, " bin"]:
    """Fit the temperatures of one branch of guidance to its labeled logits."""

    def loss(logarithms: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
        return functional.cross_entropy(labeled.logits / logarithms.exp().unsqueeze(-1), labeled.cluster_id)

    return fit_logarithms(loss, labeled.t).exp()
