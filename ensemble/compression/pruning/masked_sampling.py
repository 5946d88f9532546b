"""Sampling with masked units, differentiable along the whole trajectory at the memory of a single step.

Time-step gradient checkpointing (Zhang et al. 2024, arXiv:2412.02852): only the latents between steps are stored, and
each step is recomputed in the backward pass. The mask is an argument, sampled once per trajectory, so both computations
use the same one.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ensemble.solvers import euler_step, uniform_times
from experts.compressed.pruning.units import unit_groups
from experts.conditions.condition import Condition
from experts.expert import Expert
from experts.types import Latents

Masks = Mapping[str, Tensor]
"""Factors of the units of each layer, by its path; 1 keeps a unit, 0 removes its effect."""


def sample_with_masks(
    expert: Expert, masks: Masks, noise: Latents, condition: Condition, steps: int, *, checkpointed: bool = True
) -> Latents:
    """Sample clean latents with masked units, by Euler's method on the expert's own noise schedule in equal steps."""

    def step(noised: Latents, t: float, t_next: float) -> Latents:
        with unit_masks(expert.model, masks):
            return euler_step(lambda latents, times: expert.velocity(latents, times, condition), noised, t, t_next)

    noised = noise
    for t, t_next in pairwise(uniform_times(steps, expert.t_shift).tolist()):
        if checkpointed and torch.is_grad_enabled():
            noised = checkpoint(step, noised, t, t_next, use_reentrant=False)
        else:
            noised = step(noised, t, t_next)
    return noised


@contextmanager
def unit_masks(model: nn.Module, masks: Masks) -> Iterator[None]:
    """Multiply the outputs of units by their masks within the context, where the next layer reads them."""
    groups, handles = unit_groups(model), []
    for path, mask in masks.items():
        units = groups[path]
        reader = model.get_submodule(path).get_submodule(units.reader)
        factors = mask.repeat_interleave(units.size)
        shaped = factors[:, None, None] if isinstance(reader, nn.Conv2d) else factors
        handles.append(reader.register_forward_pre_hook(_multiply_by(shaped)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _multiply_by(mask: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """Return a hook that multiplies the input of a layer."""
    return lambda _, args: (args[0] * mask, *args[1:])
