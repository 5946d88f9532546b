"""A weight as what all experts share and how one of them differs.

    W_k = base + left_k^T right_k          low_rank
    W_k = base + q(W_k - base)             packed
    W_k = U^T diag(s_k) V + left_k^T right_k     tailors: directions U, V are shared, coefficients and the rest are own

Shared singular directions and an expert's own ones are the learngenes and tailors of DivControl (Xie et al. 2025,
arXiv:2507.23620), here of finished experts instead of conditions.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from experts.compressed.quantization.packing import BITS, Packing, Weight, empty_parts, pack, unpack

SIXTEEN = 16
WHOLE, LEFT, RIGHT = "whole", "left", "right"
"""What a base consists of: the weight itself, or left and right singular directions, one a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixFormat:
    """How a matrix is stored: as float16, or packed."""

    bits: int
    group_size: int
    """Of no meaning with 16 bits."""
    shape: tuple[int, ...]

    @classmethod
    def parsed(cls, found: Mapping[str, Any]) -> "MatrixFormat":
        """From JSON; raises `KeyError`, `TypeError` or `ValueError`."""
        storage = cls(
            bits=found["bits"], group_size=int(found["group_size"]), shape=tuple(int(side) for side in found["shape"])
        )
        if storage.bits != SIXTEEN:
            Packing.parsed(asdict(storage))
        return storage

    def of(self, shape: tuple[int, ...]) -> "MatrixFormat":
        """The same for another shape."""
        return replace(self, shape=tuple(shape))

    @property
    def packing(self) -> Packing:
        """How it is packed; `ValueError` with 16 bits."""
        if self.bits not in BITS:
            raise ValueError(f"a matrix is packed in {', '.join(map(str, BITS))} bits, not {self.bits}")
        return Packing.parsed(asdict(self) | {"scaling": "mse"})


class StoredMatrix(nn.Module):
    """A matrix in 16 bits or fewer, which is float32 whenever it is asked for."""

    def __init__(self, storage: MatrixFormat) -> None:
        """Zero, in the shapes of `storage`."""
        super().__init__()
        self.storage = storage
        if storage.bits == SIXTEEN:
            self.register_buffer("values", torch.zeros(storage.shape, dtype=torch.float16))
        else:
            for name, part in zip(("codes", "scales"), empty_parts(storage.packing), strict=True):
                self.register_buffer(name, part)

    @classmethod
    def from_matrix(cls, values: Weight, storage: MatrixFormat) -> "StoredMatrix":
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


Delta = Literal["low_rank", "packed", "tailors"]
OWN = "own"


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedWeightConfig:
    """How an expert's own part of a weight is stored."""

    delta: Delta
    bits: int
    group_size: int
    shape: tuple[int, ...]
    """Of the weight."""
    rank: int = 0
    """Of the difference, unless it is packed."""
    directions: int = 0
    """Shared ones that the expert has coefficients for; of tailors alone."""

    @classmethod
    def parsed(cls, found: Mapping[str, Any]) -> "SharedWeightConfig":
        """From JSON; raises `KeyError`, `TypeError` or `ValueError`."""
        storage, difference = MatrixFormat.parsed(found), found["delta"]
        rank, directions = int(found["rank"]), int(found["directions"])
        has_rank = rank == 0 if difference == "packed" else rank > 0
        is_known = difference in get_args(Delta) and len(storage.shape) >= 2
        if not is_known or not has_rank or directions < 0 or (directions > 0) != (difference == "tailors"):
            raise ValueError(f"a shared weight of {difference!r}, rank {rank} and {directions} directions")
        return cls(
            delta=difference,
            bits=storage.bits,
            group_size=storage.group_size,
            shape=storage.shape,
            rank=rank,
            directions=directions,
        )

    @property
    def matrix(self) -> tuple[int, int]:
        """The weight's shape as a matrix."""
        return self.shape[0], int(torch.Size(self.shape[1:]).numel())

    def storages(self) -> dict[str, MatrixFormat]:
        """What an expert stores, by name."""
        storage = MatrixFormat(bits=self.bits, group_size=self.group_size, shape=self.shape)
        if self.delta == "packed":
            return {OWN: storage}
        row, column = self.matrix
        return {LEFT: storage.of((self.rank, row)), RIGHT: storage.of((self.rank, column))}


class SharedWeight(nn.Module):
    """An expert's own part of a weight, linked to the base that it shares with the others."""

    KIND: ClassVar[str] = "shared"

    def __init__(self, sharing: SharedWeightConfig) -> None:
        """Zero, and not linked yet."""
        super().__init__()
        self.sharing = sharing
        self.parts = nn.ModuleDict({name: StoredMatrix(storage) for name, storage in sharing.storages().items()})
        self.register_buffer("coefficients", torch.zeros(sharing.directions) if sharing.directions else None)
        self.base: SharedBase | None = None

    def settings(self) -> dict[str, Any]:
        """How its own part is stored."""
        return asdict(self.sharing)

    def link(self, base: SharedBase) -> None:
        """Add to this base from now on; `ValueError` if it is of another shape."""
        found, wanted = (base.shape, base.directions), (self.sharing.shape, self.sharing.directions)
        if self.sharing.directions:
            wanted = (self.sharing.matrix, self.sharing.directions)
        if found != wanted:
            raise ValueError(f"a base of (shape, directions) {found} under a weight of {wanted}")
        self.base = base

    def forward(self, original: Tensor) -> Weight:
        """The weight; what was there before is an empty tensor. `RuntimeError` if no base is linked."""
        if self.base is None:
            raise RuntimeError(
                "this expert shares weights with others and was loaded without them; load the ensemble's whole folder"
            )
        coefficients: Tensor | None = self.get_buffer("coefficients") if self.sharing.directions else None
        weight = self.base.weight(original.device, coefficients).reshape(self.sharing.shape)
        return weight + self.difference().reshape(self.sharing.shape)

    def difference(self) -> Weight:
        """What the expert adds to the base; a matrix if it is of low rank."""
        if self.sharing.delta == "packed":
            packed: Tensor = self.parts[OWN]()
            return packed
        product: Tensor = self.parts[LEFT]().T @ self.parts[RIGHT]()
        return product


def replace_with_shared_weight(model: nn.Module, path: str, settings: Mapping[str, Any]) -> None:
    """Put an empty form at `<module>.parametrizations.<parameter>.0`; `ValueError` if it does not fit."""
    module_name, _, parameter = weight_name(path).rpartition(".")
    module, sharing = model.get_submodule(module_name), SharedWeightConfig.parsed(settings)
    shape = tuple(getattr(module, parameter).shape)
    if shape != sharing.shape:
        raise ValueError(f"{path} is a shared weight of shape {sharing.shape}, the network has {shape}")
    delattr(module, parameter)
    module.register_buffer(parameter, torch.empty(0))
    parametrize.register_parametrization(module, parameter, SharedWeight(sharing), unsafe=True)


def share_weight(
    model: nn.Module,
    name: str,
    sharing: SharedWeightConfig,
    base: SharedBase,
    parts: Mapping[str, Tensor],
    coefficients: Tensor | None = None,
) -> SharedWeight:
    """Put a weight's shared form in its place, in place, with the expert's own parts."""
    module, _, parameter = name.rpartition(".")
    path = f"{module}.parametrizations.{parameter}.0".removeprefix(".")
    replace_with_shared_weight(model, path, asdict(sharing))
    form = model.get_submodule(path)
    if not isinstance(form, SharedWeight):
        raise TypeError(f"{path} is a {type(form).__name__}")
    for part, storage in sharing.storages().items():
        form.parts[part].load_state_dict(StoredMatrix.from_matrix(parts[part], storage).state_dict())
    if coefficients is not None:
        form.get_buffer("coefficients").copy_(coefficients)
    form.link(base)
    return form


def shared_weights(model: nn.Module) -> Iterator[tuple[str, SharedWeight]]:
    """Every shared weight of a model by the name that it has in a whole one."""
    for path, module in model.named_modules():
        if isinstance(module, SharedWeight):
            yield weight_name(path), module


def weight_name(path: str) -> str:
    """The weight's own name: `entry.weight` of `entry.parametrizations.weight.0`; `ValueError` if it is no such."""
    owner, marker, parameter = f".{path}".rpartition(".parametrizations.")
    if not marker or not parameter.endswith(".0"):
        raise ValueError(f"{path} is not the path of a weight's form")
    return f"{owner}.{parameter.removesuffix('.0')}".lstrip(".")
