"""AdamW: two moments for every parameter (Loshchilov & Hutter 2019, arXiv:1711.05101)."""

from collections.abc import Iterable

import torch
from torch import nn

from experts.config import TrainingConfig
from experts.training.optimizers.adamw_on_host import AdamWOnHost


def build_adamw(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return AdamW of all parameters, on the host with `offload=[optimizer]`."""
    if "optimizer" in config.offload:
        return AdamWOnHost(model.parameters(), config)
    return adamw_of(model.parameters(), config)


def adamw_of(parameters: Iterable[nn.Parameter], config: TrainingConfig) -> torch.optim.AdamW:
    """Return AdamW of these parameters."""
    return torch.optim.AdamW(parameters, config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)


def count_adamw_values(model: nn.Module) -> int:
    """Return the numbers that AdamW keeps: two moments of every parameter."""
    return 2 * sum(parameter.numel() for parameter in model.parameters())
