"""Functions of t as ten numbers: one at the center of each bin, linear in between, constant at both ends."""

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


def interpolate(numbers: PerBin, t: Times) -> Values:
    """Return the function's value at every t; `numbers` has one row for all, or one for each."""
    centers = torch.arange(BINS, device=t.device)
    position = (t.double() * BINS - 0.5).clamp(0, BINS - 1).unsqueeze(-1)
    shares = (1 - (position - centers).abs()).clamp(min=0)
    return (shares * numbers.to(shares)).sum(-1)


def fit_logarithms(loss: Callable[[Values], Float[Tensor, ""]], t: Times) -> Float[Tensor, " bin"]:
    """Fit ten logarithms of factors that minimize `loss`, a mean over the rows that takes one logarithm per row.

    The prior of a factor is log-normal around 1 with standard deviation 1. So a factor stays finite where the rows do
    not determine it, for example where every row is correct. The result is never worse than factors of 1.
    """
    start = torch.zeros(BINS, dtype=torch.float64)
    if not len(t):
        return start
    logarithms = start.clone().requires_grad_()

    def objective(numbers: Float[Tensor, " bin"]) -> Float[Tensor, ""]:
        return loss(interpolate(numbers, t)) + numbers.square().sum() / (2 * len(t))

    optimizer = torch.optim.LBFGS([logarithms], max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Float[Tensor, ""]:
        optimizer.zero_grad()
        value = objective(logarithms)
        torch.autograd.backward(value)
        return value

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    is_better = objective(logarithms.detach()) <= objective(start)
    return logarithms.detach() if is_better else start
