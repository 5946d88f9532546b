"""Unbiased squared MMD of two sets of rows, differentiable by both.

    [sum_{i != j} k(x_i, x_j) + sum_{i != j} k(y_i, y_j)] / (m (m - 1)) - 2 sum_{ij} k(x_i, y_j) / m^2

Gretton et al. 2012 (JMLR 13), lemma 6; for a short chain of a diffusion model, Aiello et al. 2023, arXiv:2301.07969.
Where row i of both sets has the same condition, the last sum leaves out i = j too, over m (m - 1) (their equation 4):
otherwise more of its pairs would be alike than of the others'.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ensemble.stages.method import StageError

Rows = Float[Tensor, "row feature"]
OtherRows = Float[Tensor, "other feature"]
Kernel = Callable[[Rows, OtherRows], Float[Tensor, "row other"]]
BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Of the Gaussians, as multiples of the median squared distance."""
FINE = (1 / 64, 1 / 32, 1 / 16, 1 / 8)
"""The same for who has to see whether samples are blurred or alike, which wide Gaussians do not."""


def kernel_of(kind: Literal["rbf", "poly3"], real: Rows, widths: Sequence[float] = BANDWIDTHS) -> Kernel:
    """The kernel; the Gaussians' widths come from the real rows' median squared distance."""
    if kind == "poly3":
        return lambda first, second: (first @ second.T / first.shape[1] + 1) ** 3
    apart = squared_distances(real.detach(), real.detach())
    median = apart[~torch.eye(len(real), dtype=torch.bool, device=real.device)].median()

    def gaussians(first: Rows, second: OtherRows) -> Float[Tensor, "row other"]:
        apart = squared_distances(first, second) / median.clamp(min=torch.finfo(real.dtype).tiny)
        return torch.stack([torch.exp(-apart / (2 * width)) for width in widths]).mean(0)

    return gaussians


def squared_distances(first: Rows, second: OtherRows) -> Float[Tensor, "row other"]:
    """Of all pairs; its gradient is finite where two rows are equal, unlike that of the distance."""
    squares = first.square().sum(1)[:, None] + second.square().sum(1)[None]
    return (squares - 2 * first @ second.T).clamp(min=0)


def squared_mmd(
    first: Rows,
    second: OtherRows,
    kernel: Kernel,
    told: tuple[Int[Tensor, " row"], Int[Tensor, " other"]] | None = None,
    across: float = 1.0,
) -> Float[Tensor, ""]:
    """The estimate above; `told` are both sets' conditions, and pairs of unlike ones keep `across` of their kernel.

    With `told`, row i of both has the same. May be below zero. Raises `StageError` if a set has fewer than two
    rows.
    """
    if min(len(first), len(second)) < 2:
        raise StageError("the unbiased MMD needs two rows in each set; raise training.batch_size")

    def mean(pair: tuple[int, int]) -> Float[Tensor, ""]:
        sets = (first, second)
        values = kernel(sets[pair[0]], sets[pair[1]])
        if told is not None:
            values = values * (across + (1 - across) * (told[pair[0]][:, None] == told[pair[1]][None]))
        elif pair[0] != pair[1]:
            return values.mean()
        return (values.sum() - values.diagonal().sum()) / (len(values) * (len(values) - 1))

    return mean((0, 0)) + mean((1, 1)) - 2 * mean((0, 1))
