"""A-SDM's assembly: build a network of less FLOPs from the kept layers of every block, and distil it block by block.

1. Layers leave in a given order until the share of FLOPs is reached; others lose units for the rest of it.
2. Incubation: each shortened block is trained alone, behind the shortened blocks before it and in front of the original
   ones, against the original's features at its end and the original's output.
3. Layers next to removed ones may get several kernels, merged by the time of a call (`kernel_experts`): copies of their
   own (ME-CondConv), or the kernels of the removed layers (the cross-layer CLME-CondConv).
4. The assembled network is fine-tuned as a whole.

Zhu et al. 2024, arXiv:2406.00210, and 2023, arXiv:2312.15516. Both are known by their abstracts: the order `shallow` is
theirs, the schedule of the trainings and the routing are ours.
"""

import re
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ddm_core.artifacts import Workspace
from ensemble.compression.common.calibration_data import HELD_OUT, calibration_batches, output_error
from ensemble.compression.common.network_stages import STAGE, describe_layers
from ensemble.compression.distillation.teacher import copy_frozen
from ensemble.compression.method import ExpertResult, StageError
from ensemble.compression.pruning.config import AssemblyConfig
from ensemble.compression.pruning.feature_distillation import distillation_loss, feature_weights, finetune_pruned
from ensemble.compression.pruning.importance import Scores, magnitude_importance
from ensemble.compression.pruning.laptop import loss_without_layers
from experts.compressed.conditional.kernel_experts import put_kernel_experts
from experts.compressed.pruning.layers import advise_pruning, layers_disabled, removable_layers, remove_layers
from experts.compressed.pruning.units import prune_units, unit_counts, unit_groups
from experts.config import TrainingConfig
from experts.expert import Expert, network_flops
from experts.networks.adapters.registry import ADAPTERS
from experts.training.flops import count_parameters, training_flops
from experts.training.latent_dataset import Batch, LatentDataset
from experts.training.trainer import fit

TOLERANCE = 0.01
"""Largest difference between the wanted share of FLOPs and the one that is removed."""
KERNELS = re.compile(r"\.(conv[12]|to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|net\.0\.proj|net\.2|inner|outer)")
"""Paths, within a removable layer, of the convolutions and linear layers that can have several kernels."""


def prune_assembly(
    expert: Expert, dataset: LatentDataset, config: AssemblyConfig, workspace: Workspace
) -> ExpertResult:
    """Assemble a network with the wanted share of FLOPs removed, and train it against the expert.

    Raises `StageError` if the layers and units cannot meet that share, or if no kernel can be added; `Preempted`.
    """
    units = removable_layers(expert.model)
    if not units:
        raise StageError(
            f"prune=assembly removes no layers of {type(expert.model).__name__}; {advise_pruning(expert.model)} (its "
            f"layers: {describe_layers(expert.model)})"
        )
    row_flops = network_flops(expert.model, expert.latent_shape)
    batch = calibration_batches(dataset, config.rows, config.seed, 1, few_step=expert.few_step)[0]
    order = order_layers(expert, units, batch, config, workspace)
    measured = batch if config.order == "output_loss" else None
    model, removed, narrowed = assemble(expert, order, config.ratio, measured)
    measuring = calibration_batches(dataset, config.rows, config.seed, 2, HELD_OUT, expert.few_step)
    details: dict[str, Any] = {
        "order": order,
        "removed": removed,
        "narrowed": narrowed,
        "flops": network_flops(model, expert.latent_shape) / row_flops,
        "error_assembled": output_error(model, expert, measuring),
    }
    if config.kernels > 1:
        details["kernels"] = add_kernels(model, expert.model, removed, config)
    flops, changed = (len(units) + 2) * config.rows * row_flops, [*removed, *narrowed]
    if config.incubation is not None:
        stages = incubate(model, expert, dataset, batch, changed, config, workspace)
        flops += len(stages) * _distillation_flops(config.incubation, row_flops)
        details |= {"incubated": stages, "error_incubated": output_error(model, expert, measuring)}
    assembled = replace(expert, model=model)
    if config.finetune is not None:
        tuned = finetune_pruned(assembled, expert, dataset, batch, changed, config, workspace)
        assembled, flops = replace(expert, model=tuned), flops + _distillation_flops(config.finetune, row_flops)
        details["error_finetuned"] = output_error(tuned, expert, measuring)
    details["parameters"] = count_parameters(assembled.model) / count_parameters(expert.model)
    return ExpertResult(expert=assembled, modules=len(changed), flops=flops, details=details)


def order_layers(
    expert: Expert, units: Sequence[str], batch: Batch, config: AssemblyConfig, workspace: Workspace
) -> list[str]:
    """Return the removable layers in the order in which they leave."""
    if config.order == "random":
        return [units[index] for index in np.random.default_rng(config.seed).permutation(len(units))]
    flops = {path: _freed(expert, [path]) for path in units}
    if config.order == "output_loss":
        loss = loss_without_layers(expert.model, expert, batch, units, workspace)
        return sorted(units, key=lambda path: loss([units.index(path)]) / max(flops[path], 1.0))
    seen, turns = Counter[str](), dict[str, int]()
    for path in units:
        block = _stage_of(path)
        turns[path], seen[block] = seen[block], seen[block] + 1

    def depth(path: str) -> tuple[float, int]:
        density = flops[path] / max(1, count_parameters(expert.model.get_submodule(path)))
        return -round(float(np.log2(max(density, 1.0)))), turns[path]

    return sorted(units, key=depth)


def assemble(
    expert: Expert, order: Sequence[str], ratio: float, batch: Batch | None = None
) -> tuple[nn.Module, list[str], dict[str, int]]:
    """Return a network without the first layers of the order that fit, their paths, and the units left of others.

    Those are the next in the order, or with a batch those whose narrowing changes the output on it least. Raises
    `StageError` if the removed share of FLOPs is not within .01 of `ratio`.
    """
    shape, model, removed = expert.latent_shape, deepcopy(expert.model), list[str]()
    target, tolerance = (1 - ratio) * network_flops(model, shape), TOLERANCE * network_flops(model, shape)
    for path in order:
        trial = deepcopy(model)
        remove_layers(trial, [path])
        if network_flops(trial, shape) >= target:
            model = trial
            removed.append(path)
    scores = magnitude_importance(model)
    rest = [path for path in order if path not in removed and len(scores.get(path, [])) > 1]
    if batch is not None:
        changes = {path: output_error(_narrow(expert, model, scores, path, target), expert, [batch]) for path in rest}
        rest.sort(key=lambda path: changes[path])
    narrowed = dict[str, int]()
    for path in rest:
        if abs(network_flops(model, shape) - target) <= tolerance:
            break
        trial = _narrow(expert, model, scores, path, target)
        if (count := unit_groups(trial)[path].count) < len(scores[path]):
            model, narrowed[path] = trial, count
    share = 1 - network_flops(model, shape) / network_flops(expert.model, shape)
    if abs(share - ratio) > TOLERANCE or not (removed or narrowed):
        raise StageError(
            f"prune.ratio is {ratio:.1%} of the FLOPs, and without {len(removed)} of the {len(order)} removable layers "
            f"of expert {expert.cluster_id} and units of {', '.join(narrowed) or 'no other'} it is {share:.1%}; set "
            f"prune.ratio={share:.3f} or another order"
        )
    return model, removed, narrowed


def _narrow(expert: Expert, model: nn.Module, scores: Scores, path: str, target: float) -> nn.Module:
    """Return a copy without the least units of a layer, as many as bring the FLOPs near to `target` or leave one."""
    ranked, trial, narrowed = scores[path].argsort(descending=True).tolist(), deepcopy(model), deepcopy(model)
    prune_units(trial, {path: ranked[:-1]})
    flops, total = network_flops(model, expert.latent_shape), network_flops(expert.model, expert.latent_shape)
    missing, unit = flops - target, max(1.0, flops - network_flops(trial, expert.latent_shape))
    is_enough = abs(missing - round(missing / unit) * unit) <= TOLERANCE * total
    count = round(missing / unit) if is_enough else int(missing / unit)
    prune_units(narrowed, {path: ranked[: max(1, len(ranked) - max(0, count))]})
    return narrowed


def add_kernels(
    model: nn.Module, original: nn.Module, removed: Sequence[str], config: AssemblyConfig
) -> dict[str, list[str]]:
    """Give the kept layer nearest to each removed one several kernels, in place; return the donors by receiver.

    A receiver had the same shapes as the removed layer, and is of its kind if one is; its donors are the nearest first,
    and lose as many units as it did. Raises `StageError` if no removed layer has one.
    """
    kept, position = removable_layers(model), {path: index for index, path in enumerate(removable_layers(original))}
    donors = dict[str, list[str]]()
    for path in removed:
        alike = [other for other in kept if _kernel_shapes(original, other) == _kernel_shapes(original, path) != {}]
        if alike:
            nearest = min(alike, key=lambda other: (_kind(other) != _kind(path), abs(position[other] - position[path])))
            donors.setdefault(nearest, []).append(path)
    if not donors:
        raise StageError(
            f"prune.kernels is {config.kernels}, and none of the removed layers ({', '.join(removed) or 'none'}) has "
            f"convolutions or linear layers of the shapes of a kept one ({', '.join(kept) or 'none'}); set "
            "prune.kernels=1, or another order or ratio"
        )
    widths, donated, scores = unit_counts(model), deepcopy(original), magnitude_importance(original)
    for receiver, paths in donors.items():
        if receiver in widths:
            best = {path: scores[path].argsort(descending=True)[: widths[receiver]].tolist() for path in paths}
            prune_units(donated, best)
    scale = 1000.0 if ADAPTERS[type(model).__name__].time == "1000 t" else 1.0
    generator = torch.Generator().manual_seed(config.seed)
    for receiver, paths in donors.items():
        paths.sort(key=lambda path: abs(position[path] - position[receiver]))
        for name in _kernel_shapes(model, receiver):
            layers: list[Any] = [donated.get_submodule(f"{path}{name}") for path in paths if config.inherit]
            layer = put_kernel_experts(model, f"{receiver}{name}", config.kernels, scale)
            layer.inherit(layers[: config.kernels - 1], generator)
    return donors


def incubate(
    model: nn.Module,
    expert: Expert,
    dataset: LatentDataset,
    batch: Batch,
    changed: Sequence[str],
    config: AssemblyConfig,
    workspace: Workspace,
) -> list[str]:
    """Train each shortened stage of an assembled network alone, in place and in order; return the stages."""
    if config.incubation is None:
        return []
    stages = [path for path, _ in model.named_modules() if path in {_stage_of(layer) for layer in changed}]
    shortened = {path: model.get_submodule(path) for path in stages}
    weights = feature_weights(expert, stages, batch, normalize=config.normalize)
    frozen = copy_frozen(expert, config.incubation.device)
    for path in stages:
        model.set_submodule(path, deepcopy(expert.model.get_submodule(path)))
    for number, path in enumerate(stages):
        model.set_submodule(path, shortened[path])
        if not any(parameter.numel() for parameter in shortened[path].parameters()):
            continue
        model.requires_grad_(False)
        shortened[path].requires_grad_(True)
        loss = distillation_loss(frozen, [path], weights, config, config.incubation)
        hook = shortened[path].register_forward_pre_hook(_require_gradients, with_kwargs=True)
        trained = fit(model, loss, dataset, config.incubation, workspace.part(f"stage_{number}")).model
        hook.remove()
        shortened[path].load_state_dict(trained.get_submodule(path).state_dict())
    model.to("cpu").eval().requires_grad_(True)
    return stages


def _require_gradients(_stage: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Let the inputs of a stage need gradients.

    On a CPU torch 2.13 crashes in the backward pass of a trained `GroupNorm` whose input, with the channels last, needs
    none.
    """
    for value in (*args, *kwargs.values()):
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, torch.Tensor) and each.is_floating_point() and each.is_leaf:
                each.requires_grad_(True)


def _freed(expert: Expert, paths: Sequence[str]) -> float:
    """Return the FLOPs of one row that a network saves without these layers."""
    with layers_disabled(expert.model, paths):
        less = network_flops(expert.model, expert.latent_shape)
    return network_flops(expert.model, expert.latent_shape) - less


def _kernel_shapes(model: nn.Module, path: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the layers that can have several kernels, by their paths within a removable layer."""
    return {
        name.removeprefix(path): tuple(layer.weight.shape)
        for name, layer in model.named_modules()
        if name.startswith(f"{path}.")
        and KERNELS.fullmatch(name.removeprefix(path))
        and type(layer) in (nn.Linear, nn.Conv2d)
        and isinstance(layer.weight, torch.Tensor)
    }


def _kind(path: str) -> str:
    """Return the name of a layer without numbers: resnets, attn1, ff."""
    return re.sub(r"\.\d+", "", path).rpartition(".")[2]


def _stage_of(path: str) -> str:
    """Return the stage of a network that a layer belongs to."""
    match = STAGE.match(path)
    return match[0] if match else path


def _distillation_flops(training: TrainingConfig, row_flops: float) -> float:
    """Return the FLOPs of a training and of its teacher, for a network of the original's size."""
    rows = training.batch_size * training.steps
    return training_flops(row_flops, training.batch_size, training.steps) + rows * row_flops
