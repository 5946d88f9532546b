"""Mixed precision: choose the bits of every weight of every expert within one budget of bytes.

    min sum_(k, w) share_k E | v_k(x, t) - v_k(x, t; w in b_(k, w) bits) |^2    subject to    sum bytes <= budget

The sum treats the errors of weights as additive: each weight is rounded alone, on latents of the expert's own cluster.
Dong et al. 2020 (HAWQ-V2, arXiv:1911.03852, section 3.2) bound each error by the curvature; here it is measured.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddm_core.artifacts import Preempted, Workspace, read_json, write_json
from ddm_core.json_values import from_json
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
"""By weight: the mean squared change of the velocity for each bit width of `choices`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Item:
    """One weight of one expert, and its options."""

    expert_id: int
    name: str
    options: tuple[Option, ...]


def quantize_mixed_precision(config: MixedPrecisionConfig, context: CompressionContext) -> EnsembleResult:
    """Run `allocate_bits` on all experts of an ensemble."""
    experts = context.load_single_networks("mixed_precision")
    return allocate_bits(experts, context.load_latents(sorted(experts)), config, context.workspace)


def allocate_bits(
    experts: Mapping[int, Expert],
    datasets: Mapping[int, LatentDataset],
    config: MixedPrecisionConfig,
    workspace: Workspace,
) -> EnsembleResult:
    """Quantize every large weight of all experts, each to the bits that the budget allows.

    Measured costs are stored in the scratch folder, one expert at a time. Raises `StageError` if an expert has no large
    weight or the budget is too small, `Preempted` between two weights.
    """
    costs = {k: _load_or_measure_costs(k, experts, datasets[k], config, workspace) for k in sorted(experts)}
    shares = _expert_weights({k: len(datasets[k]) for k in costs}, config.by_share)
    items = list(_list_items(experts, costs, shares, config))
    elements = sum(experts[item.expert_id].model.get_parameter(item.name).numel() for item in items)
    try:
        chosen = choose_options([item.options for item in items], int(config.mean_bits * elements / 8))
    except ValueError as error:
        least = 8 * sum(min(option.size for option in item.options) for item in items) / elements
        raise StageError(
            f"quantize.mean_bits must be at least {least:.3f} with these choices and groups, scales included, and is "
            f"{config.mean_bits}; raise quantize.mean_bits, or add fewer bits to quantize.choices"
        ) from error
    bits: dict[int, dict[str, int]] = {k: {} for k in costs}
    for item, index in zip(items, chosen, strict=True):
        bits[item.expert_id][item.name] = config.choices[index]
    quantized = {k: _pack(experts[k], bits[k], config) for k in costs}
    nbytes = sum(item.options[index].size for item, index in zip(items, chosen, strict=True))
    errors = {k: _measure_error(experts[k], quantized[k], _calibration_batch(datasets[k], config)) for k in costs}
    details = {
        "mean_bits": 8 * nbytes / elements,
        "bits": bits,
        "shares": shares,
        "summed_cost": sum(item.options[index].cost for item, index in zip(items, chosen, strict=True)),
        "cost": sum(shares[k] * errors[k] for k in costs),
        "costs": costs,
    }
    return EnsembleResult(
        experts=quantized, modules=len(items), flops=_count_flops(experts, costs, config), details=details
    )


def weight_costs(expert: Expert, dataset: LatentDataset, config: MixedPrecisionConfig, workspace: Workspace) -> Costs:
    """Return the mean squared change of the velocity when each large weight alone is rounded, for each bit width."""
    batch, model = _calibration_batch(dataset, config), deepcopy(expert.model)
    rounded, exact = replace(expert, model=model), _velocity(expert, batch)
    names, costs = list(large_weights(model, config.min_elements)), Costs()
    for number, name in enumerate(names):
        workspace.report_progress(number, len(names), unit=f"weights of expert {expert.cluster_id}")
        if workspace.stop_requested():
            raise Preempted(f"stopped at weight {number} of {len(names)}; finished experts are kept")
        weight = model.get_parameter(name).data
        original = weight.clone()
        costs[name] = []
        for bits in config.choices:
            packing = _packing(original, bits, config)
            weight.copy_(unpack(*pack(original, packing), packing))
            costs[name].append(float((_velocity(rounded, batch) - exact).square().mean()))
        weight.copy_(original)
    if not costs:
        raise StageError(
            f"mixed_precision needs a matrix of at least {config.min_elements} elements, and expert "
            f"{expert.cluster_id} has none that is not quantized yet; lower quantize.min_elements"
        )
    return costs


def _load_or_measure_costs(
    k: int, experts: Mapping[int, Expert], dataset: LatentDataset, config: MixedPrecisionConfig, workspace: Workspace
) -> Costs:
    """Return the costs of one expert's weights, measured by this attempt or an earlier one."""
    path = workspace.scratch / f"costs_{k}.json"
    if not path.exists():
        write_json(path, weight_costs(experts[k], dataset, config, workspace))
    costs: Costs = read_json(path)
    return costs


def _expert_weights(counts: Mapping[int, int], by_share: bool) -> dict[int, float]:
    """Return the weight of each expert in the total cost; weights sum to 1."""
    total = sum(counts.values())
    return {k: count / total if by_share else 1 / len(counts) for k, count in counts.items()}


def _list_items(
    experts: Mapping[int, Expert], costs: Mapping[int, Costs], shares: Mapping[int, float], config: MixedPrecisionConfig
) -> Iterator[_Item]:
    """Yield every weight of every expert with its size and weighted cost at each bit width."""
    for k, costs_by_name in costs.items():
        for name, losses in costs_by_name.items():
            weight = experts[k].model.get_parameter(name)
            sizes = [_packing(weight, bits, config).nbytes for bits in config.choices]
            pairs = zip(sizes, losses, strict=True)
            options = tuple(Option(size=size, cost=shares[k] * loss) for size, loss in pairs)
            yield _Item(expert_id=k, name=name, options=options)


def _pack(expert: Expert, bits: Mapping[str, int], config: MixedPrecisionConfig) -> Expert:
    model = deepcopy(expert.model)
    for name, number in bits.items():
        pack_weight(model, name, _packing(model.get_parameter(name), number, config))
    return replace(expert, model=model)


def _packing(weight: Tensor, bits: int, config: MixedPrecisionConfig) -> Packing:
    settings = {"bits": bits, "group_size": config.group_size, "shape": tuple(weight.shape), "scaling": "mse"}
    return from_json(Packing, settings)


def _calibration_batch(dataset: LatentDataset, config: MixedPrecisionConfig) -> Batch:
    return make_batch(dataset, TrainingConfig(batch_size=config.rows, seed=config.seed), step=0)


@torch.no_grad()
def _velocity(expert: Expert, batch: Batch) -> Tensor:
    """Return the expert's velocity on a batch; in this unit, experts of different prediction types compare."""
    batch = at_few_step_times(batch, expert.few_step, TrainingConfig())
    noised = expert.noise_schedule.add_noise(batch.clean, batch.noise, batch.t)
    return expert.velocity(noised, batch.t, batch.condition)


def _measure_error(expert: Expert, quantized: Expert, batch: Batch) -> float:
    """Return the mean squared change of the velocity by all quantized weights together."""
    return float((_velocity(quantized, batch) - _velocity(expert, batch)).square().mean())


def _count_flops(experts: Mapping[int, Expert], costs: Mapping[int, Costs], config: MixedPrecisionConfig) -> float:
    """Return the FLOPs of all forward passes: one for each choice of each weight, and three more per expert."""
    passes = {k: len(weights) * len(config.choices) + 3 for k, weights in costs.items()}
    return sum(
        count * config.rows * network_flops(experts[k].model, experts[k].latent_shape) for k, count in passes.items()
    )
