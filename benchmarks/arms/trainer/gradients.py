"""Gradients of a batch in parts, with activations computed again, and of a compiled network, against the plain ones."""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import nn

from benchmarks.arms.trainer.cases import LOSS, Case, Effort, Measured, make_dataset, make_network
from benchmarks.record import Claim, Listing
from experts.config import ResidualMLPConfig, TrainingConfig
from experts.networks.registry import compile_for_training, enable_gradient_checkpointing
from experts.training.latent_dataset import Batch, make_batch

WAYS = ("4 × 16", "checkpointing", "compiled")


def measure_gradients(effort: Effort) -> Measured:
    """Compare the gradients of every network; a tiny measurement compiles nothing."""
    ways = WAYS[:2] if effort.is_tiny else WAYS
    differences = {name: compare_gradients(case, ways) for name, case in effort.cases().items()}
    values = [value for row in differences.values() for value in row if value is not None]
    claim = Claim(
        name="gradients: difference of 4 × 16 samples, with checkpointing, and compiled, relative to the largest",
        bar="≤ 1e-5",
        value=f"{max(values):.1e}",
        spread=f"n = {len(values)}",
        holds=max(values) <= 1e-5,
    )
    rows = [(name, *("–" if value is None else f"{value:.1e}" for value in row)) for name, row in differences.items()]
    return [claim], [
        Listing(
            title="gradients: largest relative difference from the plain step", columns=("network", *ways), rows=rows
        )
    ]


def compare_gradients(case: Case, ways: Sequence[str]) -> list[float | None]:
    """Return the largest difference of the gradients of each way, relative to the largest gradient.

    None for a network without checkpointing.
    """
    model, dataset = make_network(case), make_dataset(case)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.02)
    model.train()
    batch = make_batch(dataset, TrainingConfig(batch_size=64), 0)
    plain = gradients(model, [batch])
    return [
        None
        if way == "checkpointing" and isinstance(case.network, ResidualMLPConfig)
        else difference(plain, gradients_by(way, deepcopy(model), batch))
        for way in ways
    ]


def gradients_by(way: str, model: nn.Module, batch: Batch) -> list[torch.Tensor]:
    """Return the gradients of a network in one of `WAYS`."""
    if way == "checkpointing":
        enable_gradient_checkpointing(model)
    if way == "compiled":
        compile_for_training(model)
    return gradients(model, batch.divide(4) if way == "4 × 16" else [batch])


def gradients(model: nn.Module, parts: Sequence[Batch]) -> list[torch.Tensor]:
    """Return the gradients of the mean loss over all rows of the parts."""
    model.zero_grad(set_to_none=True)
    rows = sum(len(part.t) for part in parts)
    for part in parts:
        torch.autograd.backward(LOSS(model, part) * (len(part.t) / rows))
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def difference(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """Return the largest difference of two lists of gradients, relative to the largest gradient."""
    largest = max(float(gradient.abs().max()) for gradient in ours)
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) / largest
