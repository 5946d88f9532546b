"""Shared weights: the part of a weight that all experts share, and the delta of each expert.

    W_k = base + left_k^T right_k                low_rank
    W_k = base + q(W_k - base)                   packed
    W_k = U^T diag(s_k) V + left_k^T right_k     tailors: U, V are shared; s_k, left_k and right_k are the expert's
    W_k = base + U^T diag(s_k) V                 gates: U, V are shared; s_k are the expert's

Without gradients the weight that was built last is kept in the base: one expert's weights are in memory, besides the
base and the differences, and they are rebuilt when another expert is called.

Shared singular directions and an expert's own ones are the learngenes and tailors of DivControl (Xie et al. 2025,
arXiv:2507.23620), here of finished experts instead of conditions.
"""

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ddm_core.json_values import from_json
from experts.compressed.quantization.packing import BITS, Packing, Weight, empty_codes_and_scales, pack, unpack

FLOAT16_BITS = 16
FULL, LEFT, RIGHT = "whole", "left", "right"
"""Parts of a base: the weight itself, and left and right singular directions, one a row."""
BASES = ({FULL}, {LEFT, RIGHT}, {FULL, LEFT, RIGHT})


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixFormat:
    """Storage of a matrix: float16, or packed."""

    bits: int
    group_size: int
    """Unused with 16 bits."""
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        """Raise `ValueError` for a matrix that cannot be packed so."""
        if self.bits != FLOAT16_BITS:
            Packing(bits=self.bits, group_size=self.group_size, shape=self.shape)

    def with_shape(self, shape: tuple[int, ...]) -> "MatrixFormat":
        """Return the same format for another shape."""
        return replace(self, shape=tuple(shape))

    @property
    def packing(self) -> Packing:
        """Return its packing; raise `ValueError` with 16 bits."""
        if self.bits not in BITS:
            raise ValueError(f"a matrix is packed in {', '.join(map(str, BITS))} bits, not {self.bits}")
        return Packing(bits=self.bits, group_size=self.group_size, shape=self.shape, scaling="mse")


class StoredMatrix(nn.Module):
    """A matrix that is stored in 16 bits or fewer, and returned as float32."""

    def __init__(self, matrix_format: MatrixFormat) -> None:
        """Allocate zeros in the shapes of `matrix_format`."""
        super().__init__()
        self.format = matrix_format
        if matrix_format.bits == FLOAT16_BITS:
            self.register_buffer("values", torch.zeros(matrix_format.shape, dtype=torch.float16))
        else:
            for name, part in zip(("codes", "scales"), empty_codes_and_scales(matrix_format.packing), strict=True):
                self.register_buffer(name, part)

    @classmethod
    def from_matrix(cls, values: Weight, matrix_format: MatrixFormat) -> "StoredMatrix":
        """Store `values`, which have the shape of `matrix_format`."""
        stored = cls(matrix_format)
        if matrix_format.bits == FLOAT16_BITS:
            stored.get_buffer("values").copy_(values)
        else:
            for name, part in zip(("codes", "scales"), pack(values, matrix_format.packing), strict=True):
                stored.get_buffer(name).copy_(part)
        return stored

    @property
    def nbytes(self) -> int:
        """Return the bytes of its buffers."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def forward(self) -> Weight:
        """Return the matrix as float32."""
        if self.format.bits == FLOAT16_BITS:
            return self.get_buffer("values").float()
        return unpack(self.get_buffer("codes"), self.get_buffer("scales"), self.format.packing)


class SharedBase:
    """The part of one weight that all experts share; copies of a model share it too."""

    def __init__(self, parts: Mapping[str, StoredMatrix]) -> None:
        """Take `whole`, `left` and `right`, or all three; raise `ValueError` for anything else."""
        if set(parts) not in BASES:
            raise ValueError(f"a base is {FULL}, or {LEFT} and {RIGHT}, or all; got {sorted(parts)}")
        self.parts = nn.ModuleDict(parts)
        self._devices: dict[torch.device, nn.ModuleDict] = {}
        self.built: tuple[weakref.ref[SharedWeight], Weight] | None = None
        """The weight that was built last, and whose it is."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedBase":
        return self

    @property
    def nbytes(self) -> int:
        """Return the bytes of its buffers."""
        return sum(buffer.nbytes for buffer in self.parts.buffers())

    @property
    def directions(self) -> int:
        """Return the number of singular directions, 0 for a full weight."""
        return self._shapes()[LEFT][0] if LEFT in self.parts else 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the weight, or of its matrix for directions."""
        shapes = self._shapes()
        return shapes[FULL] if FULL in shapes else (shapes[LEFT][1], shapes[RIGHT][1])

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: part.format.shape for name, part in self.parts.items() if isinstance(part, StoredMatrix)}

    def weight(self, device: torch.device, coefficients: Float[Tensor, " direction"] | None = None) -> Weight:
        """Return the full weight plus the matrix of the directions with an expert's coefficients, or one of them."""
        parts = self._parts_on(device)
        full: Tensor | None = parts[FULL]() if FULL in parts else None
        if coefficients is None:
            if full is None:
                raise ValueError("directions need the coefficients of an expert; pass those of its shared weight")
            return full
        combined: Tensor = (parts[LEFT]() * coefficients.unsqueeze(1)).T @ parts[RIGHT]()
        return combined if full is None else full + combined.reshape(full.shape)

    def _parts_on(self, device: torch.device) -> nn.ModuleDict:
        """Return the parts on a device, copied once for each device."""
        if device.type == "cpu":
            return self.parts
        if device not in self._devices:
            copies = {name: _copy(part, device) for name, part in self.parts.items()}
            self._devices[device] = nn.ModuleDict(copies)
        return self._devices[device]


def _copy(part: nn.Module, device: torch.device) -> nn.Module:
    if not isinstance(part, StoredMatrix):
        raise TypeError(f"a part of a base is a {type(part).__name__}")
    copied = StoredMatrix(part.format)
    copied.load_state_dict(part.state_dict())
    return copied.to(device)


Delta = Literal["low_rank", "packed", "tailors", "gates"]
DELTA = "own"


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedWeightConfig:
    """Storage of an expert's delta to a shared weight."""

    delta: Delta
    bits: int
    group_size: int
    shape: tuple[int, ...]
    """Of the weight."""
    rank: int = 0
    """Of the delta, for low rank and tailors."""
    directions: int = 0
    """Shared directions that the expert has coefficients for, for tailors and gates."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for inconsistent fields."""
        MatrixFormat(bits=self.bits, group_size=self.group_size, shape=self.shape)
        has_rank = self.rank == 0 if self.delta in ("packed", "gates") else self.rank > 0
        has_directions = self.directions > 0 if self.delta in ("tailors", "gates") else self.directions == 0
        if self.delta not in get_args(Delta) or len(self.shape) < 2 or not has_rank or not has_directions:
            raise ValueError(
                f"a shared weight needs a rank or directions, tailors both and packed none; got {self.delta!r}, "
                f"rank {self.rank} and {self.directions} directions of shape {self.shape}"
            )

    @property
    def matrix(self) -> tuple[int, int]:
        """Return the weight's shape as a matrix."""
        return self.shape[0], int(torch.Size(self.shape[1:]).numel())

    def matrix_formats(self) -> dict[str, MatrixFormat]:
        """Return the formats of the matrices that an expert stores, by name."""
        matrix_format = MatrixFormat(bits=self.bits, group_size=self.group_size, shape=self.shape)
        if self.delta == "packed":
            return {DELTA: matrix_format}
        if self.delta == "gates":
            return {}
        row, column = self.matrix
        return {LEFT: matrix_format.with_shape((self.rank, row)), RIGHT: matrix_format.with_shape((self.rank, column))}


class SharedWeight(nn.Module):
    """An expert's delta to a weight, linked to the base that it shares with the other experts."""

    KIND: ClassVar[str] = "shared"

    def __init__(self, config: SharedWeightConfig) -> None:
        """Allocate zeros, not linked yet."""
        super().__init__()
        self.config = config
        self.parts = nn.ModuleDict(
            {name: StoredMatrix(matrix_format) for name, matrix_format in config.matrix_formats().items()}
        )
        self.register_buffer("coefficients", torch.zeros(config.directions) if config.directions else None)
        self.base: SharedBase | None = None

    def settings(self) -> dict[str, Any]:
        """Return its config as JSON."""
        return asdict(self.config)

    def link(self, base: SharedBase) -> None:
        """Add the delta to this base from now on; raise `ValueError` if it has another shape."""
        actual, expected = (base.shape, base.directions), (self.config.shape, self.config.directions)
        if self.config.delta == "tailors":
            expected = (self.config.matrix, self.config.directions)
        if actual != expected:
            raise ValueError(f"a base needs (shape, directions) {expected} of its weight; got {actual}")
        self.base = base

    def forward(self, original: Tensor) -> Weight:
        """Return base plus delta; `original` is an empty tensor. Raises `RuntimeError` if no base is linked."""
        if self.base is None:
            raise RuntimeError(
                "this expert shares weights with others and was loaded without them; load the ensemble's whole folder"
            )
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._build(self.base, original.device)
        built = self.base.built
        if built is None or built[0]() is not self or built[1].device != original.device:
            self.base.built = built = None  # frees the other expert's weight first
            self.base.built = built = weakref.ref(self), self._build(self.base, original.device)
        return built[1]

    def _build(self, base: SharedBase, device: torch.device) -> Weight:
        """Return base plus delta."""
        coefficients: Tensor | None = self.get_buffer("coefficients") if self.config.directions else None
        weight = base.weight(device, coefficients).reshape(self.config.shape)
        return weight + self.compute_delta().reshape(self.config.shape) if self.parts else weight

    def compute_delta(self) -> Weight:
        """Return the expert's delta to the base; a matrix if it has low rank."""
        if self.config.delta == "packed":
            packed: Tensor = self.parts[DELTA]()
            return packed
        product: Tensor = self.parts[LEFT]().T @ self.parts[RIGHT]()
        return product


def replace_with_shared_weight(model: nn.Module, path: str, settings: Mapping[str, Any]) -> None:
    """Put an empty `SharedWeight` at `<module>.parametrizations.<parameter>.0`.

    Raises `ValueError` if the network's weight has another shape.
    """
    module_name, _, parameter = weight_name(path).rpartition(".")
    module, config = model.get_submodule(module_name), from_json(SharedWeightConfig, settings)
    shape = tuple(getattr(module, parameter).shape)
    if shape != config.shape:
        raise ValueError(f"{path} must have the network's shape {shape}; the shared weight has {config.shape}")
    delattr(module, parameter)
    module.register_buffer(parameter, torch.empty(0))
    parametrize.register_parametrization(module, parameter, SharedWeight(config), unsafe=True)


def share_weight(
    model: nn.Module,
    name: str,
    config: SharedWeightConfig,
    base: SharedBase,
    parts: Mapping[str, Tensor],
    coefficients: Tensor | None = None,
) -> SharedWeight:
    """Replace a weight by a `SharedWeight` with the expert's matrices, in place."""
    module, _, parameter = name.rpartition(".")
    path = f"{module}.parametrizations.{parameter}.0".removeprefix(".")
    replace_with_shared_weight(model, path, asdict(config))
    shared = model.get_submodule(path)
    if not isinstance(shared, SharedWeight):
        raise TypeError(f"{path} is a {type(shared).__name__}")
    for part, matrix_format in config.matrix_formats().items():
        shared.parts[part].load_state_dict(StoredMatrix.from_matrix(parts[part], matrix_format).state_dict())
    if coefficients is not None:
        shared.get_buffer("coefficients").copy_(coefficients)
    shared.link(base)
    return shared


def shared_weights(model: nn.Module) -> Iterator[tuple[str, SharedWeight]]:
    """Yield every shared weight of a model with the name of the original weight."""
    for path, module in model.named_modules():
        if isinstance(module, SharedWeight):
            yield weight_name(path), module


def weight_name(path: str) -> str:
    """Return the original name: `entry.weight` of `entry.parametrizations.weight.0`; raise `ValueError` for others."""
    owner, marker, parameter = f".{path}".rpartition(".parametrizations.")
    if not marker or not parameter.endswith(".0"):
        raise ValueError(f"{path} is not the path of a parametrized weight")
    return f"{owner}.{parameter.removesuffix('.0')}".lstrip(".")
