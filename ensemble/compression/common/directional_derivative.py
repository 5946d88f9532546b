"""Derivative of a network along a trajectory, exactly by forward-mode differentiation or over a window of t.

Published networks embed t by sines of up to 1,000 radians, and training leaves ripples in t that no sampler notices: on
a trained network the exact derivative was 5 to 10 times as large as that over 0.04 of t.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ensemble.compression.method import StageError
from experts.diffusion.noise_schedule import expand
from experts.types import Latents, Times

DERIVATIVE_CALLS = 2
"""Calls whose FLOPs a derivative costs: both ends of a window, or each product also with the derivative of a factor."""


def directional_derivative(
    model: nn.Module,
    function: Callable[[Latents, Times], Latents],
    at: tuple[Latents, Times],
    velocity: Latents,
    step: float = 0.0,
    bounds: tuple[Times | float, Times | float] = (0.0, 1.0),
) -> Latents:
    """Return d function(noised + a velocity, t + a) / d a at a = 0, without gradient for the parameters of `model`.

    `step` is half of the window, which ends at `bounds` of t; 0 is the exact derivative. For that, attention runs as
    plain matrix products, since no fused kernel has such a derivative. Raises `StageError` if another layer has none.
    """
    noised, t = at
    if step:
        high, low = torch.as_tensor(bounds[1]).to(t), torch.as_tensor(bounds[0]).to(t)
        ahead, behind = (high - t).clamp(max=step), (t - low).clamp(max=step)
        with torch.no_grad():
            later = function(noised + expand(ahead, noised) * velocity, t + ahead)
            earlier = function(noised - expand(behind, noised) * velocity, t - behind)
        return (later - earlier) / expand(ahead + behind, noised)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _contiguous_group_norms(model):
            derivative: Tensor = torch.func.jvp(function, at, (velocity, torch.ones_like(t)))[1]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # NotImplementedError is one
        reason = str(error).partition("\n")[0]
        raise StageError(
            f"distill.derivative_step=0 needs layers with a forward derivative, and one of {type(model).__name__} has "
            f"none: {reason}; raise it"
        ) from error
    return derivative.detach()


@contextmanager
def _contiguous_group_norms(model: nn.Module) -> Iterator[None]:
    """Let group norms read tangents in rows: their derivative views them, whatever their strides are."""

    def copy(_norm: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].clone(memory_format=torch.contiguous_format), *args[1:])

    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    handles = [norm.register_forward_pre_hook(copy) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
