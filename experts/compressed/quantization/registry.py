"""Modules that take the place of a diffusers model's own layers or weights, and stand in its folder's `quantization_config.json`.

A form keeps what it holds in buffers, so the model's state dict, and the file that diffusers writes, are as small as
it is. To add one, write a module with `KIND` and `settings()`, say how an empty one is put in place, and add it to
`FORMS`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import nn

from experts.compressed.quantization.activation_quant import (
    TimestepActivationQuantizer,
    replace_with_timestep_quantizer,
)
from experts.compressed.quantization.int8_linear import Int8Linear, replace_with_int8_linear
from experts.compressed.quantization.packed_weight import PackedWeight, replace_with_packed_weight
from experts.compressed.quantization.shared_weight import SharedWeight, replace_with_shared_weight
from experts.compressed.quantization.svd_linear import SVDLinear, replace_with_svd_linear


@runtime_checkable
class QuantizedModule(Protocol):
    """What every form has; it is a `torch.nn.Module` too."""

    KIND: str
    """Its name in `quantization_config.json`."""

    def settings(self) -> dict[str, Any]:
        """What an empty form of the same shapes is made from, as JSON."""


QUANTIZED_MODULES: dict[str, Callable[[nn.Module, str, Mapping[str, Any]], None]] = {
    PackedWeight.KIND: replace_with_packed_weight,
    SharedWeight.KIND: replace_with_shared_weight,
    Int8Linear.KIND: replace_with_int8_linear,
    SVDLinear.KIND: replace_with_svd_linear,
    TimestepActivationQuantizer.KIND: replace_with_timestep_quantizer,
}
"""By name: put an empty form of these settings at a path of a model, in the place of what is there."""


def quantized_modules(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Every form in a model by its path."""
    return {
        path: {"kind": module.KIND} | module.settings()
        for path, module in model.named_modules()
        if _is_quantized(module)
    }


def replace_modules(model: nn.Module, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Put empty forms into a model, whose state dict can then be loaded; raises `KeyError` or `ValueError`."""
    for path, described in found.items():
        settings = {key: value for key, value in described.items() if key != "kind"}
        QUANTIZED_MODULES[described["kind"]](model, path, settings)


def _is_quantized(module: nn.Module) -> bool:
    return isinstance(module, QuantizedModule)
