"""Divide the images of one call into batches."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from experts.types import RowIds

Gates = Float[Tensor, "image expert"]


def plan_batches(
    count: int, batch_size: int, gates: Gates | None = None, *, one_expert: bool = False
) -> Sequence[RowIds]:
    """Return the rows of each batch, of at most `batch_size` rows.

    `gates` are those of a selection that keeps its first draw: rows of one expert then lie together, so that its
    network is called on full batches, and on the rest of its rows once. With `one_expert` no batch has rows of two
    experts.
    """
    rows = torch.arange(count)
    if gates is None or (count <= batch_size and not one_expert):
        return list(torch.split(rows, batch_size))
    expert = gates.argmax(1).cpu()
    groups = torch.split(expert.argsort(stable=True), torch.bincount(expert).tolist())
    parts = [part for group in groups if len(group) for part in torch.split(group, batch_size)]
    return parts if one_expert else _pack(parts, batch_size)


def _pack(parts: Sequence[Tensor], batch_size: int) -> Sequence[Tensor]:
    """Join parts to few batches, each part in the first batch that has room for it, the largest parts first."""
    batches: list[list[Tensor]] = []
    room: list[int] = []
    for part in sorted(parts, key=len, reverse=True):
        place = next((index for index, rows in enumerate(room) if rows >= len(part)), len(batches))
        if place == len(batches):
            batches.append([])
            room.append(batch_size)
        batches[place].append(part)
        room[place] -= len(part)
    return [torch.cat(batch) for batch in batches]
