"""What a pruned diffusers model lacks of what its `config.json` says; stands in its folder's `structure.json`.

The structure is read off the model itself, so nothing beside the model has to be kept in step with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from experts.compressed.pruning.layers import remove_layers, removed_layers
from experts.compressed.pruning.units import shrink_to, unit_counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """What is missing."""

    removed: tuple[str, ...] = ()
    """Layers that pass on what they get, by path."""
    widths: Mapping[str, int]
    """Attention heads or hidden units that are left, by the path of their module."""

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing."""
        return not self.removed and not self.widths

    @classmethod
    def of(cls, model: nn.Module) -> "Structure":
        """Read it off a model."""
        return cls(removed=tuple(removed_layers(model)), widths=unit_counts(model))

    @classmethod
    def parsed(cls, found: Mapping[str, Any]) -> "Structure":
        """From JSON; raises `KeyError`, `TypeError` or `ValueError`."""
        widths = {str(path): int(width) for path, width in found["widths"].items()}
        return cls(removed=tuple(str(path) for path in found["removed"]), widths=widths)

    def apply(self, model: nn.Module) -> None:
        """Take the same parts out of a fresh model, whose parameters are then loaded; `ValueError` if it has none."""
        remove_layers(model, self.removed)
        shrink_to(model, self.widths)
