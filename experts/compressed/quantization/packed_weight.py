"""A weight that stays in few bits in memory too: it is unpacked whenever its layer is called.

torch's parametrization puts `PackedWeight` between the layer and its weight; `torch.nn.utils.parametrize.cached()`
keeps what was unpacked, for whoever has the memory.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.utils import parametrize

from experts.compressed.quantization.packing import Packing, empty_parts, pack, unpack

ORIGINAL = "original"


class PackedWeight(nn.Module):
    """Codes and scales of one weight."""

    KIND: ClassVar[str] = "packed"
    codes: UInt8[Tensor, "row byte"]
    scales: Float[Tensor, "row group"]

    def __init__(self, packing: Packing) -> None:
        """Empty, in the shapes of `packing`."""
        super().__init__()
        self.packing = packing
        codes, scales = empty_parts(packing)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def settings(self) -> dict[str, Any]:
        """Its packing."""
        return asdict(self.packing)

    def forward(self, original: Tensor) -> Tensor:
        """The weight; what was there before is an empty tensor."""
        return unpack(self.codes, self.scales, self.packing)


def pack_weight(model: nn.Module, name: str, packing: Packing) -> None:
    """Put a weight's packed form in its place, in place."""
    codes, scales = pack(model.get_parameter(name), packing)
    module, _, parameter = name.rpartition(".")
    path = f"{module}.parametrizations.{parameter}.0".removeprefix(".")
    replace_with_packed_weight(model, path, asdict(packing))
    form: Any = model.get_submodule(path)
    form.codes.copy_(codes)
    form.scales.copy_(scales)


def replace_with_packed_weight(model: nn.Module, path: str, settings: Mapping[str, Any]) -> None:
    """Put an empty form at `<module>.parametrizations.<parameter>.0`; `ValueError` if it does not fit."""
    owner, _, parameter = path.removesuffix(".0").rpartition(".")
    module = model.get_submodule(owner.removesuffix("parametrizations").removesuffix("."))
    packing = Packing.parsed(settings)
    shape = tuple(getattr(module, parameter).shape)
    if shape != packing.shape:
        raise ValueError(f"{path} is a packed weight of shape {packing.shape}, the network has {shape}")
    delattr(module, parameter)
    module.register_buffer(parameter, torch.empty(0))
    parametrize.register_parametrization(module, parameter, PackedWeight(packing), unsafe=True)
