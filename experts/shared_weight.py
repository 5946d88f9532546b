"""A weight as what all experts share and how one of them differs.

    W_k = base + left_k^T right_k          low_rank
    W_k = base + q(W_k - base)             packed
    W_k = U^T diag(s_k) V + left_k^T right_k     tailors: directions U, V are shared, coefficients and the rest are own

Shared singular directions and an expert's own ones are the learngenes and tailors of DivControl (Xie et al. 2025,
arXiv:2507.23620), here of finished experts instead of conditions.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from experts.packing import Weight
from experts.shared_base import LEFT, RIGHT, SharedBase, Storage, StoredMatrix

Difference = Literal["low_rank", "packed", "tailors"]
OWN = "own"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """How an expert's own part of a weight is stored."""

    difference: Difference
    bits: int
    group: int
    shape: tuple[int, ...]
    """Of the weight."""
    rank: int = 0
    """Of the difference, unless it is packed."""
    directions: int = 0
    """Shared ones that the expert has coefficients for; of tailors alone."""

    @classmethod
    def parsed(cls, found: Mapping[str, Any]) -> "Sharing":
        """From JSON; raises `KeyError`, `TypeError` or `ValueError`."""
        storage, difference = Storage.parsed(found), found["difference"]
        rank, directions = int(found["rank"]), int(found["directions"])
        has_rank = rank == 0 if difference == "packed" else rank > 0
        is_known = difference in get_args(Difference) and len(storage.shape) >= 2
        if not is_known or not has_rank or directions < 0 or (directions > 0) != (difference == "tailors"):
            raise ValueError(f"a shared weight of {difference!r}, rank {rank} and {directions} directions")
        return cls(
            difference=difference,
            bits=storage.bits,
            group=storage.group,
            shape=storage.shape,
            rank=rank,
            directions=directions,
        )

    @property
    def matrix(self) -> tuple[int, int]:
        """The weight's shape as a matrix."""
        return self.shape[0], int(torch.Size(self.shape[1:]).numel())

    def storages(self) -> dict[str, Storage]:
        """What an expert stores, by name."""
        storage = Storage(bits=self.bits, group=self.group, shape=self.shape)
        if self.difference == "packed":
            return {OWN: storage}
        row, column = self.matrix
        return {LEFT: storage.of((self.rank, row)), RIGHT: storage.of((self.rank, column))}


class SharedWeight(nn.Module):
    """An expert's own part of a weight, linked to the base that it shares with the others."""

    FORM: ClassVar[str] = "shared"

    def __init__(self, sharing: Sharing) -> None:
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
        if self.sharing.difference == "packed":
            packed: Tensor = self.parts[OWN]()
            return packed
        product: Tensor = self.parts[LEFT]().T @ self.parts[RIGHT]()
        return product


def place_shared_weight(model: nn.Module, path: str, settings: Mapping[str, Any]) -> None:
    """Put an empty form at `<module>.parametrizations.<parameter>.0`; `ValueError` if it does not fit."""
    module_name, _, parameter = weight_name(path).rpartition(".")
    module, sharing = model.get_submodule(module_name), Sharing.parsed(settings)
    shape = tuple(getattr(module, parameter).shape)
    if shape != sharing.shape:
        raise ValueError(f"{path} is a shared weight of shape {sharing.shape}, the network has {shape}")
    delattr(module, parameter)
    module.register_buffer(parameter, torch.empty(0))
    parametrize.register_parametrization(module, parameter, SharedWeight(sharing), unsafe=True)


def share_weight(
    model: nn.Module,
    name: str,
    sharing: Sharing,
    base: SharedBase,
    parts: Mapping[str, Tensor],
    coefficients: Tensor | None = None,
) -> SharedWeight:
    """Put a weight's shared form in its place, in place, with the expert's own parts."""
    module, _, parameter = name.rpartition(".")
    path = f"{module}.parametrizations.{parameter}.0".removeprefix(".")
    place_shared_weight(model, path, asdict(sharing))
    form = model.get_submodule(path)
    if not isinstance(form, SharedWeight):
        raise TypeError(f"{path} is a {type(form).__name__}")
    for part, storage in sharing.storages().items():
        form.parts[part].load_state_dict(StoredMatrix.holding(parts[part], storage).state_dict())
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
