"""Registry of the modules that replace or extend layers of a diffusers model, listed in `quantization_config.json`.

A quantized module stores its data in buffers, so the model's state dict and file are as small as the module. To add
one, write a module with `KIND` and `settings()` and a function that puts an empty one in place, and add a row to
`QUANTIZED_MODULES`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import nn

from experts.architectures.task_routing import TaskRouting, add_task_routing
from experts.compressed.attention.regional import RegionalSummary, add_regional_summary
from experts.compressed.conditional.kernel_experts import KernelExperts, replace_with_kernel_experts
from experts.compressed.distillation.guidance_branch import GuidanceBranch, add_guidance_branch
from experts.compressed.distillation.interval_embedding import IntervalEmbedding, add_interval_embedding
from experts.compressed.quantization.activation_quant import (
    TimestepActivationQuantizer,
    replace_with_timestep_quantizer,
)
from experts.compressed.quantization.attention_quant import (
    AttentionOperandQuantizer,
    replace_with_operand_quantizer,
)
from experts.compressed.quantization.int8_linear import Int8Linear, replace_with_int8_linear
from experts.compressed.quantization.packed_weight import PackedWeight, replace_with_packed_weight
from experts.compressed.quantization.shared_weight import SharedWeight, replace_with_shared_weight
from experts.compressed.quantization.svd_linear import SVDLinear, replace_with_svd_linear


@runtime_checkable
class QuantizedModule(Protocol):
    """The interface of a quantized module, which is a `torch.nn.Module` too."""

    KIND: str
    """Its name in `quantization_config.json`."""

    def settings(self) -> dict[str, Any]:
        """Return the JSON from which an empty module of the same shapes is built."""


QUANTIZED_MODULES: dict[str, Callable[[nn.Module, str, Mapping[str, Any]], None]] = {
    PackedWeight.KIND: replace_with_packed_weight,
    SharedWeight.KIND: replace_with_shared_weight,
    Int8Linear.KIND: replace_with_int8_linear,
    SVDLinear.KIND: replace_with_svd_linear,
    TimestepActivationQuantizer.KIND: replace_with_timestep_quantizer,
    AttentionOperandQuantizer.KIND: replace_with_operand_quantizer,
    IntervalEmbedding.KIND: add_interval_embedding,
    GuidanceBranch.KIND: add_guidance_branch,
    TaskRouting.KIND: add_task_routing,
    RegionalSummary.KIND: add_regional_summary,
    KernelExperts.KIND: replace_with_kernel_experts,
}
"""By kind: a function (model, path, settings) that replaces the module at a path by an empty quantized one."""


def quantized_modules(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the settings of every quantized module of a model, by its path."""
    return {
        path: {"kind": module.KIND} | module.settings()
        for path, module in model.named_modules()
        if _is_quantized(module)
    }


def replace_modules(model: nn.Module, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Put empty quantized modules into a model, so that its state dict can be loaded.

    Raises `KeyError` for an unknown kind and `ValueError` for a module that does not fit.
    """
    for path, entry in settings.items():
        module_settings = {key: value for key, value in entry.items() if key != "kind"}
        QUANTIZED_MODULES[entry["kind"]](model, path, module_settings)


def _is_quantized(module: nn.Module) -> bool:
    return isinstance(module, QuantizedModule)
