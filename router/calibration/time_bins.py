"""Functions of t as ten numbers: one at the middle of each bin of t, straight lines between, level at both ends."""

from collections.abc import Callable
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

BINS: Final = 10
MAX_ITERATIONS: Final = 100

PerBin = Float[Tensor, "*batch bin"]
Times = Float[Tensor, " batch"]
Values = Float[Tensor, " batch"]


def at_t(numbers: PerBin, t: Times) -> Values:
    """The function's value at every t; `numbers` may be one row for all, or one for each."""
    middles = torch.arange(BINS, device=t.device)
    position = (t.double() * BINS - 0.5).clamp(0, BINS - 1).unsqueeze(-1)
    shares = (1 - (position - middles).abs()).clamp(min=0)
    return (shares * numbers.to(shares)).sum(-1)


def fit_logarithms(loss: Callable[[Values], Float[Tensor, ""]], t: Times) -> Float[Tensor, " bin"]:
    """Ten logarithms of factors that minimise `loss`, which is a mean over the rows and takes one logarithm a row.

    A factor is taken to be log-normal around 1 with standard deviation 1 before any row is seen: where all rows
    agree with whatever factor, as where no row is ever wrong, it stays finite. Never worse than factors of 1.
    """
    start = torch.zeros(BINS, dtype=torch.float64)
    if not len(t):
        return start
    found = start.clone().requires_grad_()

    def objective(numbers: Float[Tensor, " bin"]) -> Float[Tensor, ""]:
        return loss(at_t(numbers, t)) + numbers.square().sum() / (2 * len(t))

    optimizer = torch.optim.LBFGS([found], max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Float[Tensor, ""]:
        optimizer.zero_grad()
        value = objective(found)
        torch.autograd.backward(value)
        return value

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    is_better = objective(found.detach()) <= objective(start)
    return found.detach() if is_better else start
