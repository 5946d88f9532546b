"""Calls of networks on a few numbers of rows only, so that a row does not depend on the others to the last bit.

A matrix product of two rows may add in another order than one of sixteen: an image that is sampled alone and in a batch
then differs in its last bits. Which numbers of rows give equal bits depends on the network, the library and the
machine, so it is measured. Calls are filled up to one of these numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool
from torch import Tensor

from ensemble.ensemble import Logits, RouterModel, RowTimes
from experts.conditions.condition import Condition
from experts.diffusion.few_step import FewStepSchedule
from experts.diffusion.noise_schedule import NoiseSchedule
from experts.expert_model import ExpertModel
from experts.types import Latents, RowIds

SIZES = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Numbers of rows that are tried; a call of fewer is filled up to the next."""

RowCounts = tuple[int, ...]
"""Numbers of rows with equal bits, from the smallest; empty for a network whose rows depend on each other."""


def find_row_counts(call: Callable[[RowIds], Tensor], max_rows: int) -> RowCounts:
    """Return the numbers of rows, up to about `max_rows`, for which `call` gives every row the same bits.

    `call` evaluates the given rows of a fixed input of `max_rows` rows, at least four. Each number is tried on one
    call, of rows in another order, so that each has other neighbours and another place.
    """
    pool = max(SIZES[0], max_rows)
    shuffled = torch.randperm(pool, generator=torch.Generator().manual_seed(0))
    reference, found = call_rows(call, torch.arange(pool), SIZES[:1]), []
    for size in SIZES:
        if size > pool or not torch.equal(call(shuffled[:size]), reference[shuffled[:size]]):
            break
        found.append(size)
    return tuple(found)


def call_rows(call: Callable[[RowIds], Tensor], rows: RowIds, row_counts: RowCounts) -> Tensor:
    """Return the results of `call` on these rows, in calls of the given numbers of rows; filled with the last row."""
    if not row_counts:
        return call(rows)
    parts, start = [], 0
    while start < len(rows):
        left = len(rows) - start
        size = next((size for size in row_counts if size >= left), row_counts[-1])
        index = torch.arange(start, start + size).clamp(max=len(rows) - 1)
        parts.append(call(rows[index])[: min(size, left)])
        start += size
    return torch.cat(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactExpert(ExpertModel):
    """An expert whose every row has the same bits, whatever the other rows of a call."""

    expert: ExpertModel
    """Without a feature cache and without drafts, which keep state by row."""
    row_counts: RowCounts

    @classmethod
    def measure(cls, expert: ExpertModel, noise_schedule: NoiseSchedule, max_rows: int) -> "ExactExpert":
        """Find the numbers of rows of an expert, with random latents and the null condition."""
        pool = max(SIZES[0], max_rows)
        noised = torch.randn(pool, *expert.latent_shape, generator=torch.Generator().manual_seed(0))
        t = torch.full((pool,), 0.5 if expert.few_step is None else expert.few_step.times[0])

        def call(rows: RowIds) -> Latents:
            return expert.velocity(noised[rows], t[rows], Condition.null(len(rows)), noise_schedule)

        with torch.inference_mode():
            return cls(expert=expert, row_counts=find_row_counts(call, pool))

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Return the shape of one latent."""
        return self.expert.latent_shape

    @property
    def num_classes(self) -> int:
        """Return the number of classes; 0 is unconditional."""
        return self.expert.num_classes

    @property
    def few_step(self) -> FewStepSchedule | None:
        """Return the few t at which it may be evaluated, or None for any t."""
        return self.expert.few_step

    def velocity(self, noised: Latents, t: Tensor, condition: Condition, noise_schedule: NoiseSchedule) -> Latents:
        """Return the velocity of every row."""

        def call(rows: RowIds) -> Latents:
            return self.expert.velocity(noised[rows], t[rows], condition.rows(rows), noise_schedule)

        return call_rows(call, torch.arange(len(noised)), self.row_counts)

    def to(self, device: torch.device | str) -> "ExactExpert":
        """Move its networks to a device, in place."""
        self.expert.to(device)
        return self

    def save(self, folder: Path) -> None:
        """Write the folder of the expert."""
        self.expert.save(folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactRouter:
    """A router whose every row has the same bits, whatever the other rows of a call."""

    router: RouterModel
    row_counts: RowCounts

    @classmethod
    def measure(cls, router: RouterModel, latent_shape: tuple[int, ...], max_rows: int) -> "ExactRouter":
        """Find the numbers of rows of a router, with random latents and the null condition."""
        pool = max(SIZES[0], max_rows)
        noised = torch.randn(pool, *latent_shape, generator=torch.Generator().manual_seed(0))
        t = torch.full((pool,), 0.5)

        def call(rows: RowIds) -> Logits:
            return router.logits(noised[rows], t[rows], Condition.null(len(rows)))

        with torch.inference_mode():
            return cls(router=router, row_counts=find_row_counts(call, pool))

    @property
    def num_experts(self) -> int:
        """Return K, missing experts included."""
        return self.router.num_experts

    def logits(self, noised: Latents, t: RowTimes, condition: Condition) -> Logits:
        """Return log p(k | noised, t, condition) up to a constant per row."""

        def call(rows: RowIds) -> Logits:
            return self.router.logits(noised[rows], t[rows], condition.rows(rows))

        return call_rows(call, torch.arange(len(noised)), self.row_counts)

    def prior_logits(self, condition: Condition, present: Bool[Tensor, " expert"] | None = None) -> Logits:
        """Return log p(k | condition) among the present experts, row by row."""
        rows = [self.router.prior_logits(condition.rows(slice(row, row + 1)), present) for row in range(len(condition))]
        return torch.cat(rows)

    def to(self, device: torch.device | str) -> "ExactRouter":
        """Move the router to a device, in place."""
        self.router.to(device)
        return self

    def save(self, folder: Path) -> None:
        """Write the router's folder."""
        self.router.save(folder)
