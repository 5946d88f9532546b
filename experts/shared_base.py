"""One tensor for all experts: what they have in common of a weight, held in memory and on disk once.

It is no part of any expert's own state dict. Copies of an expert keep to the same base, since nothing changes it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from experts.packing import BITS, Packing, Weight, empty_parts, pack, unpack

SIXTEEN = 16
WHOLE, LEFT, RIGHT = "whole", "left", "right"
"""What a base consists of: the weight itself, or left and right singular directions, one a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """How a matrix is stored: as float16, or packed."""

    bits: int
    group: int
    """Of no meaning with 16 bits."""
    shape: tuple[int, ...]

    @classmethod
    def parsed(cls, found: Mapping[str, Any]) -> "Storage":
        """From JSON; raises `KeyError`, `TypeError` or `ValueError`."""
        storage = cls(bits=found["bits"], group=int(found["group"]), shape=tuple(int(side) for side in found["shape"]))
        if storage.bits != SIXTEEN:
            Packing.parsed(asdict(storage))
        return storage

    def of(self, shape: tuple[int, ...]) -> "Storage":
        """The same for another shape."""
        return replace(self, shape=tuple(shape))

    @property
    def packing(self) -> Packing:
        """How it is packed; `ValueError` with 16 bits."""
        if self.bits not in BITS:
            raise ValueError(f"a matrix is packed in {', '.join(map(str, BITS))} bits, not {self.bits}")
        return Packing.parsed(asdict(self) | {"scaling": "least_error"})


class StoredMatrix(nn.Module):
    """A matrix in 16 bits or fewer, which is float32 whenever it is asked for."""

    def __init__(self, storage: Storage) -> None:
        """Zero, in the shapes of `storage`."""
        super().__init__()
        self.storage = storage
        if storage.bits == SIXTEEN:
            self.register_buffer("values", torch.zeros(storage.shape, dtype=torch.float16))
        else:
            for name, part in zip(("codes", "scales"), empty_parts(storage.packing), strict=True):
                self.register_buffer(name, part)

    @classmethod
    def holding(cls, values: Weight, storage: Storage) -> "StoredMatrix":
        """The stored form of `values`, which have the shape that `storage` says."""
        made = cls(storage)
        if storage.bits == SIXTEEN:
            made.get_buffer("values").copy_(values)
        else:
            for name, part in zip(("codes", "scales"), pack(values, storage.packing), strict=True):
                made.get_buffer(name).copy_(part)
        return made

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def forward(self) -> Weight:
        """The matrix, float32."""
        if self.storage.bits == SIXTEEN:
            return self.get_buffer("values").float()
        return unpack(self.get_buffer("codes"), self.get_buffer("scales"), self.storage.packing)


class SharedBase:
    """The parts of one weight that all experts share."""

    def __init__(self, parts: Mapping[str, StoredMatrix]) -> None:
        """`whole` alone, or `left` and `right`; `ValueError` for anything else."""
        if set(parts) not in ({WHOLE}, {LEFT, RIGHT}):
            raise ValueError(f"a base is {WHOLE}, or {LEFT} and {RIGHT}; got {sorted(parts)}")
        self.parts = nn.ModuleDict(parts)
        self._devices: dict[torch.device, nn.ModuleDict] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedBase":
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored."""
        return sum(buffer.nbytes for buffer in self.parts.buffers())

    @property
    def directions(self) -> int:
        """Singular directions, 0 if it is a whole weight."""
        return self._shapes()[LEFT][0] if LEFT in self.parts else 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight; that of its matrix if it is directions."""
        shapes = self._shapes()
        return shapes[WHOLE] if WHOLE in shapes else (shapes[LEFT][1], shapes[RIGHT][1])

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: part.storage.shape for name, part in self.parts.items() if isinstance(part, StoredMatrix)}

    def weight(self, device: torch.device, coefficients: Float[Tensor, " direction"] | None = None) -> Weight:
        """The whole weight, or the matrix of the directions with an expert's own coefficients."""
        parts = self._at(device)
        if coefficients is None:
            whole: Tensor = parts[WHOLE]()
            return whole
        combined: Tensor = (parts[LEFT]() * coefficients.unsqueeze(1)).T @ parts[RIGHT]()
        return combined

    def _at(self, device: torch.device) -> nn.ModuleDict:
        """One copy a device."""
        if device.type == "cpu":
            return self.parts
        if device not in self._devices:
            copies = {name: _copy(part, device) for name, part in self.parts.items()}
            self._devices[device] = nn.ModuleDict(copies)
        return self._devices[device]


def _copy(part: nn.Module, device: torch.device) -> nn.Module:
    if not isinstance(part, StoredMatrix):
        raise TypeError(f"a part of a base is a {type(part).__name__}")
    copied = StoredMatrix(part.storage)
    copied.load_state_dict(part.state_dict())
    return copied.to(device)
