"""Bits by sensitivity: each weight of each expert gets as many as one budget of bytes allows and its rounding needs.

    min sum_(k, w) share_k E | v_k(x, t) - v_k(x, t; w in b_(k, w) bits) |^2    so that    sum bytes <= budget

Each weight is rounded alone, on latents of the expert's own cluster, and the losses are added. Instead of by a bound on
the curvature (Dong et al. 2020, HAWQ-V2, arXiv:1911.03852, section 3.2) each loss is measured.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddm_core.artifacts import Preempted, Workspace, read_json, write_json
from ensemble.compression.common.calibration_data import at_few_step_times
from ensemble.compression.common.knapsack import Option, choose_options
from ensemble.compression.method import CompressionContext, EnsembleResult, StageError
from ensemble.compression.quantization.config import MixedPrecisionConfig
from ensemble.compression.quantization.weight_only import large_weights
from experts.compressed.quantization.packed_weight import pack_weight
from experts.compressed.quantization.packing import Packing, pack, unpack
from experts.config import TrainingConfig
from experts.expert import Expert, network_flops
from experts.training.latent_dataset import Batch, LatentDataset, make_batch

Costs = dict[str, list[float]]
"""By weight: the mean squared change of the velocity with each of the choices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Item:
    """One weight of one expert."""

    expert_id: int
    name: str
    options: tuple[Option, ...]


def quantize_mixed_precision(config: MixedPrecisionConfig, given: CompressionContext) -> EnsembleResult:
    """What `allot_bits` makes of all experts of an ensemble."""
    experts = given.experts("mixed_precision")
    return allocate_bits(experts, given.latents(sorted(experts)), config, given.workspace)


def allocate_bits(
    experts: Mapping[int, Expert],
    datasets: Mapping[int, LatentDataset],
    config: MixedPrecisionConfig,
    workspace: Workspace,
) -> EnsembleResult:
    """The same experts with every large weight packed, in bits of its own.

    What was measured is kept in the scratch folder, one expert at a time. Raises `StageError` if an expert has no large
    weight or the budget is too small, `Preempted` between two weights.
    """
    costs = {k: _kept_costs(k, experts, datasets[k], config, workspace) for k in sorted(experts)}
    shares = _shares({k: len(datasets[k]) for k in costs}, config.by_share)
    items = list(_items(experts, costs, shares, config))
    entries = sum(experts[item.expert_id].model.get_parameter(item.name).numel() for item in items)
    try:
        chosen = choose_options([item.options for item in items], int(config.mean_bits * entries / 8))
    except ValueError as error:
        least = 8 * sum(min(option.size for option in item.options) for item in items) / entries
        raise StageError(
            f"bits needs at least {least:.3f} bits an entry with these choices and groups, scales included: raise "
            f"bits.mean_bits of {config.mean_bits}, or allow fewer bits in bits.choices"
        ) from error
    bits: dict[int, dict[str, int]] = {k: {} for k in costs}
    for item, index in zip(items, chosen, strict=True):
        bits[item.expert_id][item.name] = config.choices[index]
    made = {k: _packed(experts[k], bits[k], config) for k in costs}
    spent = sum(item.options[index].size for item, index in zip(items, chosen, strict=True))
    details = {
        "mean_bits": 8 * spent / entries,
        "bits": bits,
        "shares": shares,
        "summed_cost": sum(item.options[index].cost for item, index in zip(items, chosen, strict=True)),
        "cost": sum(shares[k] * _loss(experts[k], made[k], _batch(datasets[k], config)) for k in costs),
        "costs": costs,
    }
    return EnsembleResult(experts=made, modules=len(items), flops=_flops(experts, costs, config), details=details)


def weight_costs(expert: Expert, dataset: LatentDataset, config: MixedPrecisionConfig, workspace: Workspace) -> Costs:
    """What rounding each large weight alone does to the expert's velocity, a mean square for each of the choices."""
    batch, model = _batch(dataset, config), deepcopy(expert.model)
    rounded, whole = replace(expert, model=model), _velocity(expert, batch)
    names, costs = list(large_weights(model, config.min_elements)), Costs()
    for number, name in enumerate(names):
        workspace.report_progress(number, len(names), unit=f"weights of expert {expert.cluster_id}")
        if workspace.stop_requested():
            raise Preempted(f"stopped at weight {number} of {len(names)}; finished experts are kept")
        weight = model.get_parameter(name).data
        kept = weight.clone()
        costs[name] = []
        for bits in config.choices:
            packing = _packing(kept, bits, config)
            weight.copy_(unpack(*pack(kept, packing), packing))
            costs[name].append(float((_velocity(rounded, batch) - whole).square().mean()))
        weight.copy_(kept)
    if not costs:
        raise StageError(
            f"bits found no matrix of at least {config.min_elements} entries in expert {expert.cluster_id}, so it would do "
            "nothing: lower bits.least"
        )
    return costs


def _kept_costs(
    k: int, experts: Mapping[int, Expert], dataset: LatentDataset, config: MixedPrecisionConfig, workspace: Workspace
) -> Costs:
    """The costs of one expert's weights, measured by this attempt or an earlier one."""
    path = workspace.scratch / f"costs_{k}.json"
    if not path.exists():
        write_json(path, weight_costs(experts[k], dataset, config, workspace))
    found: Costs = read_json(path)
    return found


def _shares(counts: Mapping[int, int], by_share: bool) -> dict[int, float]:
    """How much each expert counts; they add up to one."""
    total = sum(counts.values())
    return {k: count / total if by_share else 1 / len(counts) for k, count in counts.items()}


def _items(
    experts: Mapping[int, Expert], costs: Mapping[int, Costs], shares: Mapping[int, float], config: MixedPrecisionConfig
) -> Iterator[_Item]:
    for k, found in costs.items():
        for name, losses in found.items():
            weight = experts[k].model.get_parameter(name)
            sizes = [_packing(weight, bits, config).nbytes for bits in config.choices]
            pairs = zip(sizes, losses, strict=True)
            options = tuple(Option(size=size, cost=shares[k] * loss) for size, loss in pairs)
            yield _Item(expert_id=k, name=name, options=options)


def _packed(expert: Expert, bits: Mapping[str, int], config: MixedPrecisionConfig) -> Expert:
    model = deepcopy(expert.model)
    for name, number in bits.items():
        pack_weight(model, name, _packing(model.get_parameter(name), number, config))
    return replace(expert, model=model)


def _packing(weight: Tensor, bits: int, config: MixedPrecisionConfig) -> Packing:
    described = {"bits": bits, "group_size": config.group_size, "shape": weight.shape, "scaling": "mse"}
    return Packing.parsed(described)


def _batch(dataset: LatentDataset, config: MixedPrecisionConfig) -> Batch:
    return make_batch(dataset, TrainingConfig(batch_size=config.rows, seed=config.seed), step=0)


@torch.no_grad()
def _velocity(expert: Expert, batch: Batch) -> Tensor:
    """In velocity, so that experts of different predictions compare."""
    batch = at_few_step_times(batch, expert.few_step, TrainingConfig())
    noised = expert.noise_schedule.add_noise(batch.clean, batch.noise, batch.t)
    return expert.velocity(noised, batch.t, batch.condition)


def _loss(expert: Expert, made: Expert, batch: Batch) -> float:
    """The mean squared change of the velocity by all weights together."""
    return float((_velocity(made, batch) - _velocity(expert, batch)).square().mean())


def _flops(experts: Mapping[int, Expert], costs: Mapping[int, Costs], config: MixedPrecisionConfig) -> float:
    """Of all forward passes: each choice of each weight, and three of the whole."""
    passes = {k: len(found) * len(config.choices) + 3 for k, found in costs.items()}
    return sum(
        count * config.rows * network_flops(experts[k].model, experts[k].latent_shape) for k, count in passes.items()
    )
