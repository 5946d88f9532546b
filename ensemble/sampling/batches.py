"""Divide the images of one call into batches."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

Gates = Float[Tensor, "image expert"]


def plan_batches(
    count: int, batch_size: int, gates: Gates | None = None, *, one_expert: bool = False
) -> Sequence[Int[Tensor, " row"]]:
    """Return the rows of each batch, of at most `batch_size` rows.

    `gates` are those of a selection that keeps its first draw: rows of one expert then lie together, so that its
    network is called on full batches. With `one_expert` no batch has rows of two experts.
    """
    rows = torch.arange(count)
    if gates is None or (count <= batch_size and not one_expert):
        return list(torch.split(rows, batch_size))
    expert = gates.argmax(1).cpu()
    order = expert.argsort(stable=True)
    groups = torch.split(order, torch.bincount(expert).tolist()) if one_expert else [order]
    return [part for group in groups if len(group) for part in torch.split(group, batch_size)]
