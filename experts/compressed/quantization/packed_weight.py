"""Weights that are packed in memory too, and unpacked on every call of their layer.

torch's parametrization puts `PackedWeight` between the layer and its weight. Inside
`torch.nn.utils.parametrize.cached()` the unpacked weight is cached, at the cost of its memory.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ddm_core.json_values import from_json
from experts.compressed.quantization.packing import Packing, empty_codes_and_scales, pack, unpack


class PackedWeight(nn.Module):
    """Codes and scales of one weight."""

    KIND: ClassVar[str] = "packed"
    codes: UInt8[Tensor, "row byte"]
    scales: Float[Tensor, "row group"]

    def __init__(self, packing: Packing) -> None:
        """Allocate zeros in the shapes of `packing`."""
        super().__init__()
        self.packing = packing
        codes, scales = empty_codes_and_scales(packing)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def settings(self) -> dict[str, Any]:
        """Return its packing as JSON."""
        return asdict(self.packing)

    def forward(self, original: Tensor) -> Tensor:
        """Return the weight; `original` is an empty tensor."""
        return unpack(self.codes, self.scales, self.packing)


def pack_weight(model: nn.Module, name: str, packing: Packing) -> None:
    """Replace a weight by its packed form, in place."""
    codes, scales = pack(model.get_parameter(name), packing)
    module, _, parameter = name.rpartition(".")
    path = f"{module}.parametrizations.{parameter}.0".removeprefix(".")
    replace_with_packed_weight(model, path, asdict(packing))
    packed: Any = model.get_submodule(path)
    packed.codes.copy_(codes)
    packed.scales.copy_(scales)


def replace_with_packed_weight(model: nn.Module, path: str, settings: Mapping[str, Any]) -> None:
    """Put an empty `PackedWeight` at `<module>.parametrizations.<parameter>.0`.

    Raises `ValueError` if the network's weight has another shape.
    """
    owner, _, parameter = path.removesuffix(".0").rpartition(".")
    module = model.get_submodule(owner.removesuffix("parametrizations").removesuffix("."))
    packing = from_json(Packing, settings)
    shape = tuple(getattr(module, parameter).shape)
    if shape != packing.shape:
        raise ValueError(f"{path} must have the network's shape {shape}; the packed weight has {packing.shape}")
    delattr(module, parameter)
    module.register_buffer(parameter, torch.empty(0))
    parametrize.register_parametrization(module, parameter, PackedWeight(packing), unsafe=True)
