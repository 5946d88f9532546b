"""AdamW with moments of eight bits, by torchao (Dettmers et al. 2022, arXiv:2110.02861): a quarter of their memory.

Moments of fewer than 4,096 numbers, or of another number than a multiple of 256, keep 32 bits.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from experts.config import TrainingConfig
from experts.training.optimizers.muon import OptimizerError

PARTS = ("codes", "scale", "qmap")
"""The plain tensors of a moment."""

LEAST, BLOCK = 4096, 256


def build_adamw_8bit(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return torchao's `AdamW8bit` of all parameters; raise `OptimizerError` without that package."""
    kind = _import("torchao.optim").AdamW8bit
    optimizer: torch.optim.Optimizer = kind(
        model.parameters(), config.lr, betas=config.betas, weight_decay=config.weight_decay
    )
    return optimizer


def _import(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise OptimizerError(
            f"training.optimizer=adamw_8bit needs torchao ({error}); run `pip install torchao`, or set "
            "training.optimizer=adamw"
        ) from error


def count_adamw_8bit_values(model: nn.Module) -> int:
    """Return the memory of its moments in numbers of 32 bits."""
    sizes = [parameter.numel() for parameter in model.parameters()]
    return sum(2 * (size // 4 + size // BLOCK if _is_8_bit(size) else size) for size in sizes)


def _is_8_bit(size: int) -> bool:
    return size >= LEAST and size % BLOCK == 0


def split_moment(moment: Tensor) -> Mapping[str, Tensor]:
    """Return the plain tensors of a moment by the end of their name; of one in 32 bits itself, with an empty one."""
    is_plain = type(moment) is Tensor or not hasattr(moment, PARTS[0])
    return {"": moment} if is_plain else {f":{part}": getattr(moment, part) for part in PARTS}


def join_moment(parts: Mapping[str, Tensor]) -> Tensor:
    """Return a moment of what `split_moment` made of it."""
    if "" in parts:
        return parts[""]
    codes, scale, qmap = (parts[f":{part}"] for part in PARTS)
    kind = _import("torchao.optim.subclass_8bit").OptimState8bit
    moment: Tensor = kind(codes, scale, qmap, bool(qmap.min() < 0), torch.float32)
    return moment
