"""Muon for the matrices of a network's blocks, AdamW for its other parameters (Jordan et al. 2024).

The update of a matrix is orthogonalized and scaled to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982, section
2.2), so both use the same learning rate and weight decay.
"""

from collections.abc import Callable

import torch
from torch import nn

from ddm_core.errors import DDMError
from experts.config import TrainingConfig
from experts.training.optimizers.adamw import adamw_of


class OptimizerError(DDMError, ValueError):
    """An optimizer does not fit a network."""


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimizers as one, with common parameter groups and state."""

    def __init__(self, model: nn.Module, config: TrainingConfig) -> None:
        """Divide the parameters of `model`; raise `OptimizerError` if it has no matrices for Muon."""
        matrices = find_matrices(model)
        known = set(matrices)
        others = [parameter for parameter in model.parameters() if parameter not in known]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                matrices,
                config.lr,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        ]
        if others:
            self.parts.append(adamw_of(others, config))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        for part in self.parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient; return the value of `closure`, which is called first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


def count_muon_values(model: nn.Module) -> int:
    """Return the numbers that it keeps: one of every matrix's entries, two of every other parameter."""
    total, matrices = (sum(p.numel() for p in parameters) for parameters in (model.parameters(), find_matrices(model)))
    return 2 * total - matrices


def find_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the trainable weights of linear layers inside a list of blocks; raise `OptimizerError` if there are none.

    First and last layers, embeddings, kernels of convolutions and vectors are not among them.
    """
    layers = [
        layer
        for blocks in model.modules()
        if isinstance(blocks, nn.ModuleList)
        for layer in blocks.modules()
        if isinstance(layer, nn.Linear) and layer.weight.requires_grad
    ]
    if not layers:
        raise OptimizerError(
            f"training.optimizer=muon needs linear layers inside a list of blocks; {type(model).__name__} has none; "
            "set training.optimizer=adamw"
        )
    return list(dict.fromkeys(layer.weight for layer in layers))
