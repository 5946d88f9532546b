"""The structure of a pruned diffusers model: `structure.json`, the difference to the model that `config.json` builds.

The structure is read from the model itself, so it is never stored twice.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from experts.compressed.pruning.layers import remove_layers, removed_layers
from experts.compressed.pruning.units import shrink_to, unit_counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """Layers and units that a pruned model lacks."""

    removed: tuple[str, ...]
    """Paths of removed layers, which pass on their input."""
    widths: Mapping[str, int]
    """Attention heads or hidden units that are left, by the path of their module."""

    @property
    def is_unpruned(self) -> bool:
        """Return whether nothing is missing."""
        return not self.removed and not self.widths

    @classmethod
    def from_model(cls, model: nn.Module) -> "Structure":
        """Read the structure of a model."""
        return cls(removed=tuple(removed_layers(model)), widths=unit_counts(model))

    def apply(self, model: nn.Module) -> None:
        """Remove the same parts from a new model, in place; raise `ValueError` if the model lacks one of them."""
        remove_layers(model, self.removed)
        shrink_to(model, self.widths)
