"""Weights in few bits, rounded to nearest, in memory as on disk; and linear layers that multiply in eight bits."""

import logging
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace

from torch import nn

from ensemble.compression.config import DynamicInt8Config, WeightOnlyConfig
from ensemble.compression.method import ExpertResult, StageError
from experts.compressed.quantization.int8_linear import NO_INSTRUCTIONS, Int8Linear, computes_in_int8
from experts.compressed.quantization.packed_weight import pack_weight
from experts.compressed.quantization.packing import Packing
from experts.compressed.quantization.registry import quantized_modules
from experts.expert import Expert

log = logging.getLogger(__name__)


def quantize_weights(expert: Expert, config: WeightOnlyConfig) -> ExpertResult:
    """Every large weight of the expert in few bits."""
    model = deepcopy(expert.model)
    count = pack_all(model, config)
    if not count:
        raise StageError(
            f"quantize found no matrix of at least {config.min_elements} entries in expert {expert.cluster_id}, so it would "
            "do nothing: lower quantize.min_elements"
        )
    return ExpertResult(expert=replace(expert, model=model), modules=count, flops=0.0)


def quantize_dynamic_int8(expert: Expert, config: DynamicInt8Config) -> ExpertResult:
    """Every linear layer of the expert in eight bits, its other large weights stored in few."""
    model = deepcopy(expert.model)
    layers = [path for path, module in model.named_modules() if type(module) is nn.Linear and "." in path]
    if not layers:
        raise StageError(
            f"expert {expert.cluster_id} has no linear layer to compute in eight bits; take quantize=int8_weight_only"
        )
    if not computes_in_int8():
        log.warning(NO_INSTRUCTIONS)
    for path in layers:
        linear = model.get_submodule(path)
        if isinstance(linear, nn.Linear):
            model.set_submodule(path, Int8Linear.of(linear, _packing(linear.weight.shape, config)))
    return ExpertResult(expert=replace(expert, model=model), modules=len(layers) + pack_all(model, config), flops=0.0)


def pack_all(model: nn.Module, config: WeightOnlyConfig | DynamicInt8Config) -> int:
    """Pack every weight of at least `config.least` entries that no form holds yet, in place; how many there were."""
    names = list(large_weights(model, config.min_elements))
    for name in names:
        pack_weight(model, name, _packing(model.get_parameter(name).shape, config))
    return len(names)


def large_weights(model: nn.Module, least: int) -> Iterator[str]:
    """Names of the parameters of two dimensions or more, and so many entries, that no form holds yet."""
    held = tuple(f"{path}." for path in quantized_modules(model))
    for name, weight in model.named_parameters():
        if weight.ndim >= 2 and weight.numel() >= least and not name.startswith(held):
            yield name


def _packing(shape: tuple[int, ...], config: WeightOnlyConfig | DynamicInt8Config) -> Packing:
    return Packing(bits=config.bits, group_size=config.group_size, shape=tuple(shape), scaling="mse")
