"""A network whose layers are rounded as they will be, but still hold their exact weights, so that they can be trained.

`rounded` makes one, `settled` turns it into one that holds nothing but few bits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ensemble.stages.method import StageError
from experts.fake_quant import best_grids, codes_at, rounded_weight
from experts.packed_weight import place_packed_weight
from experts.packing import Packing, Weight, pack
from experts.timed_input import NAME, round_input


class RoundedWeight(nn.Module):
    """Between a layer and its weight: rounds it with a scale a row that stays."""

    scales: Float[Tensor, "row 1"]

    def __init__(self, weight: Weight, bits: Literal[4, 8]) -> None:
        """With the scales of least squared error."""
        super().__init__()
        entries = weight[0].numel()
        shape = tuple(weight.shape)
        self.packing = Packing(bits=bits, group=entries + entries % 2, shape=shape, scaling="least_error")
        self.register_buffer("scales", pack(weight, self.packing)[1])

    def forward(self, weight: Weight) -> Weight:
        """The rounded weight; gradients pass to the exact one."""
        return rounded_weight(weight, self.scales, self.packing.bits)


def round_layers(
    model: nn.Module,
    samples: Mapping[str, Float[Tensor, "grid entry"]],
    times: Float[Tensor, " grid"],
    bits: Literal[4, 8],
    activation_bits: Literal[4, 8],
) -> None:
    """Round the weights of these layers, and what they are given, in place; `samples` are of that, at these times."""
    for path, found in samples.items():
        form = round_input(model, path, len(times), activation_bits)
        for kept, best in zip((form.steps, form.zeros), best_grids(found, activation_bits), strict=True):
            kept.copy_(best)
        form.times.copy_(times)
        layer = model.get_submodule(path)
        parametrize.register_parametrization(layer, "weight", RoundedWeight(_weight_of(layer), bits))


def learn_only(model: nn.Module, paths: Sequence[str]) -> None:
    """Make the exact weights and the step sizes of these layers all that learns, in place."""
    model.requires_grad_(False)
    for path in paths:
        layer: Any = model.get_submodule(path)
        layer.parametrizations.weight.original.requires_grad_(True)
        layer.get_submodule(NAME).learn()


def settle_steps(model: nn.Module, paths: Sequence[str]) -> None:
    """Keep the step sizes of these layers as they have become, in place."""
    for path in paths:
        form: Any = model.get_submodule(f"{path}.{NAME}")
        form.settle()
    model.requires_grad_(True)


def hold_few_bits(model: nn.Module, paths: Sequence[str]) -> None:
    """Keep nothing of the weights of these layers but their few bits, in place."""
    for path in paths:
        layer: Any = model.get_submodule(path)
        rounding: RoundedWeight = layer.parametrizations.weight[0]
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        codes = codes_at(layer.weight, rounding.scales, rounding.packing)
        form = f"{path}.parametrizations.weight.0"
        place_packed_weight(model, form, asdict(rounding.packing))
        kept: Any = model.get_submodule(form)
        kept.codes.copy_(codes)
        kept.scales.copy_(rounding.scales)


def _weight_of(layer: nn.Module) -> Weight:
    weight = layer.weight
    if not isinstance(weight, Tensor):
        raise StageError(f"a {type(layer).__name__} has no weight to round; leave it out")
    return weight.detach()
