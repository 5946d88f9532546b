"""Size of a network: its parameters, and its FLOPs, counted from the operators that it calls."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from torch.utils.module_tracker import ModuleTracker


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters of a network."""
    return sum(parameter.numel() for parameter in model.parameters())


FUSED_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""The fused operator of a CPU, which also runs on the meta device; torch does not count it."""


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """Return the FLOPs of attention from the shapes of its inputs."""
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def forward_flops(call: Callable[[], object]) -> float:
    """Return the FLOPs of one call, usually of a network on one row on the CPU; a multiply-add counts as two.

    Attention runs as plain matrix products, the only implementation that is counted on every device.
    """
    counter = flop_counter()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        call()
    return float(counter.get_total_flops())


class _UntrackedModules(ModuleTracker):
    """Attributes all FLOPs to the whole; torch's tracker fails in inference on parameters that are arguments."""

    def __enter__(self) -> "_UntrackedModules":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def flop_counter() -> FlopCounterMode:
    """Return a counter of the FLOPs within its block; of attention it knows the plain and the fused operators."""
    counter = FlopCounterMode(display=False, custom_mapping={FUSED_ATTENTION: _attention_flops})
    counter.mod_tracker = _UntrackedModules()
    return counter


def training_flops(forward: float, batch_size: int, steps: int) -> float:
    """Return the FLOPs of training; a backward pass costs two forward passes (Kaplan et al. 2020, arXiv:2001.08361)."""
    return 3.0 * forward * batch_size * steps
