"""What a router answers to noised samples of known clusters, at every t: from this, numbers per bin of t are fitted."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from experts.condition import Condition
from experts.latents import LatentDataset
from experts.noise_path import NoisePath
from router.t_bins import BINS

ROWS: Final = 2048
"""Noised samples in every bin of t, however many clean ones there are, so that the cost is known before."""
SEED: Final = 17_060_459

Logits = Float[Tensor, "batch expert"]
Latents = Float[Tensor, "batch *latent"]
Times = Float[Tensor, " batch"]
Speak = Callable[[Latents, Times, Condition], Logits]
"""(noised, t, condition) to one number per expert."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """One row for each noised sample."""

    said: Logits
    """What was answered, in double precision."""
    t: Times
    cluster_id: Int[Tensor, " batch"]
    """The truth."""

    def rows(self, keep: Tensor) -> "Answers":
        """The chosen rows."""
        return Answers(said=self.said[keep], t=self.t[keep], cluster_id=self.cluster_id[keep])


@torch.no_grad()
def ask(speak: Speak, dataset: LatentDataset, path: NoisePath, *, is_told: bool) -> Answers:
    """Ask about samples spread evenly over `dataset`, at their true proportions; the same ones at every call.

    Told the condition, rows without a class are left out; else the condition is null.
    """
    rows = torch.arange(ROWS) * len(dataset) // ROWS
    clean, class_id = dataset.clean.index_select(0, rows), dataset.class_id.index_select(0, rows)
    condition = Condition(class_id) if is_told else Condition.null(ROWS)
    said, times = [], []
    for index in range(BINS):
        generator = torch.Generator().manual_seed(SEED + index)
        t = (index + torch.rand(ROWS, generator=generator)) / BINS
        noise = torch.randn(clean.shape, generator=generator)
        said.append(speak(path.noised(clean, noise, t), t, condition).double())
        times.append(t)
    cluster_id = dataset.cluster_id.index_select(0, rows).repeat(BINS)
    every = Answers(said=torch.cat(said), t=torch.cat(times), cluster_id=cluster_id)
    return every.rows(class_id.repeat(BINS) >= 0) if is_told else every
