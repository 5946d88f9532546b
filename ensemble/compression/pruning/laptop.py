"""LAPTOP-Diff: remove whole layers, those that change the output least, and fine-tune the rest.

    min over S of E |e(all but S) - e(all)|^2    subject to    size of S >= target
    ~ sum over S of c_i,    c_i = E |e(all but i) - e(all)|^2,    which makes it a 0-1 knapsack

where the size of a set is what its removal frees, which may be more than its layers have.

Zhang et al. 2024, arXiv:2404.11098.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ddm_core.artifacts import Preempted, Workspace
from ensemble.compression.common.calibration_data import HELD_OUT, calibration_batches, output_error, run_network
from ensemble.compression.common.knapsack import choose_items
from ensemble.compression.method import ExpertResult, StageError
from ensemble.compression.pruning.config import LaptopConfig
from ensemble.compression.pruning.feature_distillation import finetune_pruned
from experts.compressed.pruning.layers import (
    advise_pruning,
    layer_sizes,
    layers_disabled,
    removable_layers,
    remove_layers,
)
from experts.expert import Expert, network_flops
from experts.training.flops import count_parameters, training_flops
from experts.training.latent_dataset import Batch, LatentDataset


@dataclass(frozen=True, slots=True, kw_only=True)
class Additivity:
    """Comparison of joint losses with sums of single losses, over random sets of layers."""

    spearman: float
    """Rank correlation of sums and joint losses."""
    ratio: float
    """Median of joint loss / sum."""
    sums: tuple[float, ...]
    joint: tuple[float, ...]
    sizes: tuple[int, ...]
    """Number of layers of each set."""


def measure_additivity(
    costs: Sequence[float], joint_cost: Callable[[list[int]], float], sets: int, seed: int
) -> Additivity:
    """Compare joint and summed losses of `sets` random sets, from two layers up to half of all."""
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
    """Remove the layers that change the output least, and fine-tune the rest.

    Raises `StageError` if the removable layers have too few parameters, `Preempted` between two of them.
    """
    model, units = deepcopy(expert.model), removable_layers(expert.model)
    batch = calibration_batches(dataset, config.rows, config.seed, 1, few_step=expert.few_step)[0]
    row_flops, total = network_flops(model, expert.latent_shape), count_parameters(model)
    sizes = {frozenset(map(units.index, paths)): size for paths, size in layer_sizes(model).items()}
    target = round(config.ratio * total)
    if not units:
        raise StageError(f"prune=laptop removes no layers of {type(model).__name__}; {advise_pruning(model)}")
    if sum(sizes.values()) < target:
        raise StageError(
            f"prune.ratio is {config.ratio:.0%}, and the {len(units)} removable layers of expert {expert.cluster_id} "
            f"have only {sum(sizes.values()) / total:.0%} of its parameters; lower prune.ratio"
        )
    measure_loss = loss_without_layers(model, expert, batch, units, workspace)
    costs = [measure_loss([index]) for index in range(len(units))] if config.criterion == "output_loss" else []
    details: dict[str, Any] = {"costs": dict(zip(units, costs, strict=False))}
    if costs and config.additivity_sets:
        details["additivity"] = measure_additivity(costs, measure_loss, config.additivity_sets, config.seed)
    chosen = _choose_layers(model, units, sizes, costs, target, config)
    details |= {"removed": [units[index] for index in chosen], "joint_cost": measure_loss(chosen)}
    remove_layers(model, details["removed"])
    pruned = replace(expert, model=model)
    measuring = calibration_batches(dataset, config.rows, config.seed, 2, HELD_OUT, expert.few_step)
    details["error_pruned"] = output_error(model, expert, measuring)
    flops = (len(costs) + config.additivity_sets + 2) * config.rows * row_flops
    if config.finetune is not None:
        pruned = replace(
            pruned, model=finetune_pruned(pruned, expert, dataset, batch, details["removed"], config, workspace)
        )
        pruned_flops = network_flops(pruned.model, expert.latent_shape)
        rows = config.finetune.batch_size * config.finetune.steps
        flops += training_flops(pruned_flops, config.finetune.batch_size, config.finetune.steps) + rows * row_flops
        details["error_retrained"] = output_error(pruned.model, expert, measuring)
    details["share"] = 1 - count_parameters(pruned.model) / total
    return ExpertResult(expert=pruned, modules=len(chosen), flops=flops, details=details)


def loss_without_layers(
    model: nn.Module, expert: Expert, batch: Batch, units: Sequence[str], workspace: Workspace
) -> Callable[[list[int]], float]:
    """Return a function from indices of units to the mean squared change of the output without them, on one batch."""
    with torch.no_grad():
        exact = run_network(model, expert, batch)

    def measure_loss(indices: list[int]) -> float:
        if workspace.stop_requested():
            raise Preempted("stopped while losses of layers were measured; the measurement restarts")
        with torch.no_grad(), layers_disabled(model, [units[index] for index in indices]):
            output: Tensor = run_network(model, expert, batch)
        return float(functional.mse_loss(output.double(), exact.double()))

    return measure_loss


def _choose_layers(
    model: nn.Module,
    units: Sequence[str],
    sizes: Mapping[frozenset[int], int],
    costs: Sequence[float],
    target: int,
    config: LaptopConfig,
) -> list[int]:
    """Return the indices of the layers to remove; the baselines add layers one by one until the target is reached."""
    if config.criterion == "output_loss":
        joint = {items: size for items, size in sizes.items() if len(items) > 1}
        return choose_items(costs, [sizes[frozenset([index])] for index in range(len(units))], target, joint)
    if config.criterion == "magnitude":
        order = sorted(range(len(units)), key=lambda index: _magnitude(model.get_submodule(units[index])))
    else:
        order = np.random.default_rng(config.seed).permutation(len(units)).tolist()
    chosen: list[int] = []
    while sum(size for items, size in sizes.items() if items <= set(chosen)) < target:
        chosen.append(order[len(chosen)])
    return sorted(chosen)


def _magnitude(module: nn.Module) -> float:
    """Return the mean absolute weight."""
    total = sum(float(parameter.detach().abs().sum()) for parameter in module.parameters())
    return total / max(1, count_parameters(module))
