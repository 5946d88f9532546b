"""Quantization-aware training: layers compute with rounded weights and inputs, but keep exact weights to train.

`fake_quantize_weights` prepares a network, `convert` ends a training, and `pack_quantized_weights` keeps only few bits.
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ensemble.compression.method import StageError
from experts.compressed.quantization.activation_quant import LR_FACTOR, TimestepActivationQuantizer
from experts.compressed.quantization.attention_quant import attention_layers
from experts.compressed.quantization.fake_quant import encode_with_scales, fake_quantize_weight, scaled_gradient
from experts.compressed.quantization.packed_weight import replace_with_packed_weight
from experts.compressed.quantization.packing import Packing, Weight, pack

LEARNED_STEPS = ".log_change"
"""End of the names of trained step sizes and scales."""


class LearnableWeightQuantizer(nn.Module):
    """Parametrization that rounds a layer's weight, with one scale per row that is fixed or learned."""

    scales: Float[Tensor, "row 1"]
    log_change: nn.Parameter | None
    """Learned change of the scales, by a factor exp(LR_FACTOR log_change); None while they are fixed."""

    def __init__(self, weight: Weight, bits: Literal[4, 8]) -> None:
        """Set the scales to those of least squared error."""
        super().__init__()
        entries = weight[0].numel()
        shape = tuple(weight.shape)
        self.packing = Packing(bits=bits, group_size=entries + entries % 2, shape=shape, scaling="mse")
        self.register_buffer("scales", pack(weight, self.packing)[1])
        self.register_parameter("log_change", None)

    def forward(self, weight: Weight) -> Weight:
        """Round a weight; gradients pass straight through to the exact one."""
        scales = self.scales.float()
        if self.log_change is not None:
            # Esser et al. 2020 (LSQ, arXiv:1902.08153, section 2.2): gradients of a step size by 1 / sqrt(N q_max).
            factor = (weight[0].numel() * (2 ** (self.packing.bits - 1) - 1)) ** -0.5
            scales = scales * (LR_FACTOR * scaled_gradient(self.log_change, factor)).exp()
        return fake_quantize_weight(weight, scales, self.packing.bits)

    def make_learnable(self) -> None:
        """Make the scales learnable."""
        self.log_change = nn.Parameter(torch.zeros(self.scales.shape, device=self.scales.device))

    def convert(self) -> None:
        """Store the learned scales and freeze them."""
        if self.log_change is not None:
            self.scales.copy_(self.scales * (LR_FACTOR * self.log_change.detach()).exp())
            self.log_change = None


def fake_quantize_weights(model: nn.Module, paths: Sequence[str], bits: Literal[4, 8]) -> None:
    """Round the weights of these layers, in place."""
    for path in paths:
        layer = model.get_submodule(path)
        parametrize.register_parametrization(layer, "weight", LearnableWeightQuantizer(_detached_weight(layer), bits))


def train_only(model: nn.Module, paths: Sequence[str], vectors: Sequence[str] = ()) -> dict[str, int]:
    """Make only the exact weights and step sizes of `paths` trainable, in place; return the trainable sizes, by name.

    The biases, step sizes and weight scales of `vectors` become trainable too, but not their weights; so do the step
    sizes of attention layers that have one of these layers.
    """
    model.requires_grad_(False)
    for quantizer in _activation_quantizers(model, {*paths, *vectors}):
        quantizer.make_learnable()
    for path in paths:
        exact_weight(model, path).requires_grad_(True)
    for path in vectors:
        weight_quantizer(model, path).make_learnable()
        if (bias := model.get_submodule(path).bias) is not None:
            bias.requires_grad_(True)
    return {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}


def convert(model: nn.Module, paths: Sequence[str]) -> None:
    """Store the learned step sizes and scales of these layers and freeze them, in place."""
    for path in paths:
        weight_quantizer(model, path).convert()
    for quantizer in _activation_quantizers(model, paths):
        quantizer.freeze()
    model.requires_grad_(True)


def pack_quantized_weights(model: nn.Module, paths: Sequence[str]) -> None:
    """Replace the exact weights of these layers by their packed codes, in place."""
    for path in paths:
        layer: Any = model.get_submodule(path)
        quantizer: LearnableWeightQuantizer = weight_quantizer(model, path)
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        codes = encode_with_scales(layer.weight, quantizer.scales, quantizer.packing)
        packed_path = f"{path}.parametrizations.weight.0"
        replace_with_packed_weight(model, packed_path, asdict(quantizer.packing))
        packed: Any = model.get_submodule(packed_path)
        packed.codes.copy_(codes)
        packed.scales.copy_(quantizer.scales)


def exact_weight(model: nn.Module, path: str) -> Tensor:
    """Return the weight of a layer before rounding."""
    weight: Tensor = _parametrization(model, path).original
    return weight


def _activation_quantizers(model: nn.Module, paths: Collection[str]) -> list[TimestepActivationQuantizer]:
    """Return what rounds the inputs of these layers, and the operands of the attention layers that they belong to."""
    owners = {*paths, *(path for path in attention_layers(model) if any(one.startswith(f"{path}.") for one in paths))}
    return [
        module
        for path, module in model.named_modules()
        if isinstance(module, TimestepActivationQuantizer) and path.rpartition(".")[0] in owners
    ]


def weight_quantizer(model: nn.Module, path: str) -> LearnableWeightQuantizer:
    """Return what rounds the weight of a layer."""
    quantizer: LearnableWeightQuantizer = _parametrization(model, path)[0]
    return quantizer


def _parametrization(model: nn.Module, path: str) -> Any:
    """Return the parametrization list of a layer's weight: its quantizer, and the exact weight as `original`."""
    return model.get_submodule(f"{path}.parametrizations.weight")


def _detached_weight(layer: nn.Module) -> Weight:
    weight = layer.weight
    if not isinstance(weight, Tensor):
        raise StageError(f"a {type(layer).__name__} has no weight to quantize; leave this layer out")
    return weight.detach()
