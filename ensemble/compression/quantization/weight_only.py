"""Round-to-nearest quantization: weights in few bits, or linear layers that also multiply in 8 bits.

    q = round(w / s),  w' = s q,    one scale s for each group of neighboring weights, of least squared error

int8_dynamic also rounds activations, with a scale per row that is computed at run time (torchao: Int8WeightOnlyConfig,
Int8DynamicActivationInt8WeightConfig). Quantized weights stay packed in memory.
"""

import logging
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace

from torch import nn

from ensemble.compression.common.network_stages import describe_layers
from ensemble.compression.config import DynamicInt8Config, WeightOnlyConfig
from ensemble.compression.method import ExpertResult, StageError
from experts.compressed.conditional.kernel_experts import KernelExperts
from experts.compressed.quantization.int8_linear import NO_INT8_INSTRUCTIONS, Int8Linear, computes_in_int8
from experts.compressed.quantization.packed_weight import pack_weight
from experts.compressed.quantization.packing import Packing
from experts.compressed.quantization.registry import quantized_modules
from experts.expert import Expert

log = logging.getLogger(__name__)


def quantize_weights(expert: Expert, config: WeightOnlyConfig) -> ExpertResult:
    """Quantize every large weight of the expert; raise `StageError` if there is none."""
    model = deepcopy(expert.model)
    count = pack_all(model, config)
    if not count:
        raise StageError(
            f"weight_only needs a matrix of at least {config.min_elements} elements, and expert "
            f"{expert.cluster_id} has none that is not quantized yet; lower quantize.min_elements (its layers: "
            f"{describe_layers(model)})"
        )
    return ExpertResult(expert=replace(expert, model=model), modules=count, flops=0.0)


def quantize_dynamic_int8(expert: Expert, config: DynamicInt8Config) -> ExpertResult:
    """Replace every linear layer by one that multiplies in 8 bits, and pack the other large weights."""
    model = deepcopy(expert.model)
    layers = [path for path, module in model.named_modules() if type(module) is nn.Linear and "." in path]
    if not layers:
        raise StageError(
            f"dynamic_int8 needs linear layers, and expert {expert.cluster_id} has no linear layer that is not "
            f"quantized yet; set quantize=int8_weight_only (its layers: {describe_layers(model)})"
        )
    if not computes_in_int8():
        log.warning(NO_INT8_INSTRUCTIONS)
    for path in layers:
        linear = model.get_submodule(path)
        if isinstance(linear, nn.Linear):
            model.set_submodule(path, Int8Linear.from_linear(linear, _packing(linear.weight.shape, config)))
    return ExpertResult(expert=replace(expert, model=model), modules=len(layers) + pack_all(model, config), flops=0.0)


def pack_all(model: nn.Module, config: WeightOnlyConfig | DynamicInt8Config) -> int:
    """Pack every large weight that is not quantized yet, in place, and return the number of packed weights."""
    names = list(large_weights(model, config.min_elements))
    for name in names:
        pack_weight(model, name, _packing(model.get_parameter(name).shape, config))
    return len(names)


def large_weights(model: nn.Module, min_elements: int) -> Iterator[str]:
    """Yield the names of unquantized parameters with at least two dimensions and `min_elements` elements."""
    entries = quantized_modules(model).items()
    quantized = tuple(f"{path}." for path, entry in entries if entry["kind"] != KernelExperts.KIND)
    for name, weight in model.named_parameters():
        if weight.ndim >= 2 and weight.numel() >= min_elements and not name.startswith(quantized):
            yield name


def _packing(shape: tuple[int, ...], config: WeightOnlyConfig | DynamicInt8Config) -> Packing:
    return Packing(bits=config.bits, group_size=config.group_size, shape=tuple(shape), scaling="mse")
