"""From noise to a clean latent under one fixed mask, with gradients at the memory of a single step.

Zhang et al. 2024, arXiv:2412.02852 (time-step gradient checkpointing): only the latents between steps are kept,
and each step is computed again when its gradient is due. The mask is an argument, drawn once for a trajectory, so both
computations see the same.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ensemble.solvers import euler_step, uniform_times
from experts.compressed.pruning.units import unit_groups
from experts.condition import Condition
from experts.diffusion.noise_schedule import Latents
from experts.expert import Expert

Masks = Mapping[str, Tensor]
"""A number for each unit of a layer, by its path; 1 keeps the unit, 0 is as if it were not there."""


def sample_with_masks(
    expert: Expert, masks: Masks, noise: Latents, condition: Condition, steps: int, *, checkpointed: bool = True
) -> Latents:
    """Euler's method on the expert's own path in equal steps from t = 1 to t = 0, with its units masked."""

    def step(noised: Latents, t: float, t_next: float) -> Latents:
        with unit_masks(expert.model, masks):
            return euler_step(lambda at, times: expert.velocity(at, times, condition), noised, t, t_next)

    noised = noise
    for t, t_next in pairwise(uniform_times(steps).tolist()):
        if checkpointed and torch.is_grad_enabled():
            noised = checkpoint(step, noised, t, t_next, use_reentrant=False)
        else:
            noised = step(noised, t, t_next)
    return noised


@contextmanager
def unit_masks(model: nn.Module, masks: Masks) -> Iterator[None]:
    """Within it, what units of these layers put out is multiplied by their masks before it is read."""
    found, handles = unit_groups(model), []
    for path, mask in masks.items():
        units = found[path]
        reader = model.get_submodule(path).get_submodule(units.reader)
        entries = mask.repeat_interleave(units.size)
        shaped = entries[:, None, None] if isinstance(reader, nn.Conv2d) else entries
        handles.append(reader.register_forward_pre_hook(_times(shaped)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _times(mask: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A hook that multiplies what a layer is given."""
    return lambda _, args: (args[0] * mask, *args[1:])
