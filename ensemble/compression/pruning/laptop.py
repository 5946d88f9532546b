"""LAPTOP-Diff: layers are taken out whole, and what is left learns from the whole network.

    min over S of E |e(all but S) - e(all)|^2, so that S has enough parameters; nearly a sum over S of
    c_i = E |e(all but i) - e(all)|^2, and so a 0-1 knapsack

Zhang et al. 2024, arXiv:2404.11098.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ddm_core.artifacts import Preempted, Workspace
from ensemble.compression.common.calibration_data import HELD_OUT, calibration_batches, output_error, run_network
from ensemble.compression.common.knapsack import knapsack
from ensemble.compression.distillation.teacher import frozen_copy
from ensemble.compression.method import ExpertResult, StageError
from ensemble.compression.pruning.config import LaptopConfig
from ensemble.compression.pruning.feature_distillation import distillation_loss, feature_weights, stages_behind
from experts.compressed.pruning.layers import layers_disabled, removable_layers, remove_layers
from experts.expert import Expert, network_flops
from experts.training.flops import training_flops
from experts.training.latent_dataset import Batch, LatentDataset
from experts.training.trainer import fit


@dataclass(frozen=True, slots=True, kw_only=True)
class Additivity:
    """Sums of single losses against joint losses, over random sets of layers."""

    spearman: float
    """Their rank correlation."""
    ratio: float
    """Median of joint over sum."""
    sums: tuple[float, ...]
    joint: tuple[float, ...]
    sizes: tuple[int, ...]
    """Layers of each set."""


def additivity(costs: Sequence[float], joint_cost: Callable[[list[int]], float], sets: int, seed: int) -> Additivity:
    """Over `sets` random sets of two layers up to half of them; `joint_cost` takes their indices."""
    generator = np.random.default_rng(seed)
    sums, joint, sizes = [], [], []
    for _ in range(sets):
        size = int(generator.integers(2, max(3, len(costs) // 2 + 1)))
        chosen = sorted(generator.choice(len(costs), size, replace=False).tolist())
        sums.append(sum(costs[index] for index in chosen))
        joint.append(joint_cost(chosen))
        sizes.append(size)
    first, second = (np.argsort(np.argsort(values)).astype(float) for values in (sums, joint))
    return Additivity(
        spearman=float(np.corrcoef(first, second)[0, 1]),
        ratio=float(np.median(np.array(joint) / np.array(sums))),
        sums=tuple(sums),
        joint=tuple(joint),
        sizes=tuple(sizes),
    )


def prune_laptop(expert: Expert, dataset: LatentDataset, config: LaptopConfig, workspace: Workspace) -> ExpertResult:
    """The expert without the layers it misses least, trained again.

    Raises `StageError` if its removable layers have too few parameters, `Preempted` between two of them.
    """
    model, units = deepcopy(expert.model), removable_layers(expert.model)
    batch = calibration_batches(dataset, config.rows, config.seed, 1, course=expert.few_step)[0]
    row, whole = network_flops(model, expert.latent_shape), _parameters(model)
    sizes = [_parameters(model.get_submodule(unit)) for unit in units]
    target = round(config.ratio * whole)
    if sum(sizes) < target:
        raise StageError(
            f"the {len(units)} layers of expert {expert.cluster_id} that can be taken out have "
            f"{sum(sizes) / whole:.0%} of its parameters, and {config.ratio:.0%} are to go; lower prune.ratio"
        )
    lost = _loss_of(model, expert, batch, units, workspace)
    costs = [lost([index]) for index in range(len(units))] if config.criterion == "output_loss" else []
    details: dict[str, Any] = {"costs": dict(zip(units, costs, strict=False))}
    if costs and config.additivity_sets:
        details["additivity"] = additivity(costs, lost, config.additivity_sets, config.seed)
    chosen = _chosen(model, units, sizes, costs, target, config)
    details |= {"removed": [units[index] for index in chosen], "joint_cost": lost(chosen)}
    remove_layers(model, details["removed"])
    pruned = replace(expert, model=model)
    measuring = calibration_batches(dataset, config.rows, config.seed, 2, HELD_OUT, expert.few_step)
    details["error_pruned"] = output_error(model, expert, measuring)
    flops = (len(costs) + config.additivity_sets + 2) * config.rows * row
    if config.finetune is not None:
        pruned = replace(
            pruned, model=_retrained(pruned, expert, dataset, batch, details["removed"], config, workspace)
        )
        small = network_flops(pruned.model, expert.latent_shape)
        rows = config.finetune.batch_size * config.finetune.steps
        flops += training_flops(small, config.finetune.batch_size, config.finetune.steps) + rows * row
        details["error_retrained"] = output_error(pruned.model, expert, measuring)
    details["share"] = 1 - _parameters(pruned.model) / whole
    return ExpertResult(expert=pruned, modules=len(chosen), flops=flops, details=details)


def _loss_of(
    model: nn.Module, expert: Expert, batch: Batch, units: Sequence[str], workspace: Workspace
) -> Callable[[list[int]], float]:
    """What is lost without some units, by their indices: mean squared distance of the outputs on one fixed batch."""
    with torch.no_grad():
        exact = run_network(model, expert, batch)

    def lost(indices: list[int]) -> float:
        if workspace.stop_requested():
            raise Preempted("stopped while layers were compared; they are compared again")
        with torch.no_grad(), layers_disabled(model, [units[index] for index in indices]):
            said: Tensor = run_network(model, expert, batch)
        return float(functional.mse_loss(said.double(), exact.double()))

    return lost


def _chosen(
    model: nn.Module,
    units: Sequence[str],
    sizes: Sequence[int],
    costs: Sequence[float],
    target: int,
    config: LaptopConfig,
) -> list[int]:
    """Indices of the units that go; the baselines take them one by one until it is enough."""
    if config.criterion == "output_loss":
        return knapsack(costs, sizes, target)
    if config.criterion == "magnitude":
        order = sorted(range(len(units)), key=lambda index: _magnitude(model.get_submodule(units[index])))
    else:
        order = np.random.default_rng(config.seed).permutation(len(units)).tolist()
    chosen: list[int] = []
    while sum(sizes[index] for index in chosen) < target:
        chosen.append(order[len(chosen)])
    return sorted(chosen)


def _retrained(
    pruned: Expert,
    teacher: Expert,
    dataset: LatentDataset,
    batch: Batch,
    removed: Sequence[str],
    config: LaptopConfig,
    workspace: Workspace,
) -> nn.Module:
    if config.finetune is None:
        return pruned.model
    paths = stages_behind(teacher.model, removed) if config.feature_weight else []
    weights = feature_weights(teacher, paths, batch, normalise=config.normalize)
    there = frozen_copy(teacher, config.finetune.device)
    loss = distillation_loss(there, paths, weights, config, config.finetune)
    return fit(deepcopy(pruned.model), loss, dataset, config.finetune, workspace).model


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _magnitude(module: nn.Module) -> float:
    """Mean absolute weight."""
    total = sum(float(parameter.detach().abs().sum()) for parameter in module.parameters())
    return total / max(1, _parameters(module))
