"""A network whose layers are rounded as they will be, but still hold their exact weights, so that they can be trained.

`round_layers` makes one, `hold_few_bits` turns it into one that holds nothing but few bits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ensemble.compression.method import StageError
from experts.compressed.quantization.activation_quant import NAME, RATE, quantize_input
from experts.compressed.quantization.fake_quant import best_grids, codes_at, fake_quantize_weight, scaled_gradient
from experts.compressed.quantization.packed_weight import replace_with_packed_weight
from experts.compressed.quantization.packing import Packing, Weight, pack


class LearnableWeightQuantizer(nn.Module):
    """Between a layer and its weight: rounds it with a scale a row that stays."""

    scales: Float[Tensor, "row 1"]
    log_change: nn.Parameter | None
    """How the scales change while they learn: exp(RATE log_change); None otherwise."""

    def __init__(self, weight: Weight, bits: Literal[4, 8]) -> None:
        """With the scales of least squared error."""
        super().__init__()
        entries = weight[0].numel()
        shape = tuple(weight.shape)
        self.packing = Packing(bits=bits, group_size=entries + entries % 2, shape=shape, scaling="mse")
        self.register_buffer("scales", pack(weight, self.packing)[1])
        self.register_parameter("log_change", None)

    def forward(self, weight: Weight) -> Weight:
        """The rounded weight; gradients pass to the exact one."""
        scales = self.scales.float()
        if self.log_change is not None:
            # Esser et al. 2020 (LSQ, arXiv:1902.08153, section 2.2): gradients of a step size by 1 / sqrt(N q_max).
            factor = (weight[0].numel() * (2 ** (self.packing.bits - 1) - 1)) ** -0.5
            scales = scales * (RATE * scaled_gradient(self.log_change, factor)).exp()
        return fake_quantize_weight(weight, scales, self.packing.bits)

    def make_learnable(self) -> None:
        """Make the scales learnable."""
        self.log_change = nn.Parameter(torch.zeros(self.scales.shape, device=self.scales.device))

    def convert(self) -> None:
        """Keep the scales as they have become."""
        if self.log_change is not None:
            self.scales.copy_(self.scales * (RATE * self.log_change.detach()).exp())
            self.log_change = None


def fake_quantize_layers(
    model: nn.Module,
    samples: Mapping[str, Float[Tensor, "grid entry"]],
    times: Float[Tensor, " grid"],
    bits: Literal[4, 8],
    activation_bits: Literal[4, 8],
) -> None:
    """Round the weights of these layers, and what they are given, in place; `samples` are of that, at these times."""
    for path, found in samples.items():
        form = quantize_input(model, path, len(times), activation_bits)
        for kept, best in zip((form.steps, form.zeros), best_grids(found, activation_bits), strict=True):
            kept.copy_(best)
        form.times.copy_(times)
        layer = model.get_submodule(path)
        parametrize.register_parametrization(layer, "weight", LearnableWeightQuantizer(_weight_of(layer), bits))


def learn_only(model: nn.Module, paths: Sequence[str], vectors: Sequence[str] = ()) -> dict[str, int]:
    """Make the exact weights and the step sizes of these layers all that learns, in place; sizes of what does, by name.

    Of the layers in `vectors` the biases, step sizes and scales of the weights learn too, while the weights stay.
    """
    model.requires_grad_(False)
    for path in {*paths, *vectors}:
        _input_of(model, path).learn()
    for path in paths:
        exact_weight(model, path).requires_grad_(True)
    for path in vectors:
        _parts(model, path)[0].learn()
        if (bias := model.get_submodule(path).bias) is not None:
            bias.requires_grad_(True)
    return {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}


def convert(model: nn.Module, paths: Sequence[str]) -> None:
    """Keep the step sizes and scales of these layers as they have become, in place."""
    for path in paths:
        _input_of(model, path).settle()
        _parts(model, path)[0].settle()
    model.requires_grad_(True)


def pack_quantized_weights(model: nn.Module, paths: Sequence[str]) -> None:
    """Keep nothing of the weights of these layers but their few bits, in place."""
    for path in paths:
        layer: Any = model.get_submodule(path)
        rounding: LearnableWeightQuantizer = _parts(model, path)[0]
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        codes = codes_at(layer.weight, rounding.scales, rounding.packing)
        form = f"{path}.parametrizations.weight.0"
        replace_with_packed_weight(model, form, asdict(rounding.packing))
        kept: Any = model.get_submodule(form)
        kept.codes.copy_(codes)
        kept.scales.copy_(rounding.scales)


def exact_weight(model: nn.Module, path: str) -> Tensor:
    """What a rounded layer's weight is before it is rounded."""
    weight: Tensor = _parts(model, path).original
    return weight


def _input_of(model: nn.Module, path: str) -> Any:
    """What rounds the input of a layer."""
    return model.get_submodule(f"{path}.{NAME}")


def _parts(model: nn.Module, path: str) -> Any:
    """What stands between a rounded layer and its weight: the rounding, and the exact weight as `original`."""
    return model.get_submodule(f"{path}.parametrizations.weight")


def _weight_of(layer: nn.Module) -> Weight:
    weight = layer.weight
    if not isinstance(weight, Tensor):
        raise StageError(f"a {type(layer).__name__} has no weight to round; leave it out")
    return weight.detach()
