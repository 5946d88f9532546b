"""The optimizers by name.

adamw       all parameters
adamw_8bit  all parameters, with moments of eight bits
muon        matrices of the blocks; AdamW for the rest
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from experts.config import OptimizerName, TrainingConfig
from experts.training.optimizers.adamw import build_adamw, count_adamw_values
from experts.training.optimizers.adamw_8bit import build_adamw_8bit, count_adamw_8bit_values
from experts.training.optimizers.muon import MuonWithAdamW, count_muon_values


@dataclass(frozen=True, slots=True)
class OptimizerKind:
    """How an optimizer is built, and what it keeps."""

    build: Callable[[nn.Module, TrainingConfig], torch.optim.Optimizer]
    """Its state is tensors alone, by parameter; those of eight bits are split in a checkpoint."""
    count_values: Callable[[nn.Module], int]
    """The float32 numbers of that state; the network may be on the meta device."""


OPTIMIZERS: dict[OptimizerName, OptimizerKind] = {
    "adamw": OptimizerKind(build_adamw, count_adamw_values),
    "adamw_8bit": OptimizerKind(build_adamw_8bit, count_adamw_8bit_values),
    "muon": OptimizerKind(MuonWithAdamW, count_muon_values),
}
