"""Conditions of samples; the null condition is a value, not a missing argument."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

NULL_CLASS = -1


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition a row."""

    class_id: Int[Tensor, " batch"]
    """Class of every row; -1 is the null condition."""

    @classmethod
    def null(cls, batch: int, device: torch.device | str = "cpu") -> "Condition":
        """Return the null condition for `batch` rows."""
        return cls(torch.full((batch,), NULL_CLASS, dtype=torch.int64, device=device))

    @classmethod
    def concatenate(cls, parts: Sequence["Condition"]) -> "Condition":
        """Return the rows of all parts, in order."""
        return cls(torch.cat([part.class_id for part in parts]))

    def rows(self, index: Int[Tensor, " row"] | Bool[Tensor, " batch"] | slice) -> "Condition":
        """Return the selected rows."""
        return Condition(self.class_id[index])

    def drop(self, mask: Bool[Tensor, " batch"]) -> "Condition":
        """Return the condition with null where `mask` is true."""
        return Condition(self.class_id.masked_fill(mask, NULL_CLASS))

    def to(self, device: torch.device | str) -> "Condition":
        """Return the condition on another device."""
        return Condition(self.class_id.to(device))

    def embedding_index(self, num_classes: int) -> Int[Tensor, " batch"]:
        """Return rows of a class embedding; null is row `num_classes`, after all classes."""
        return self.class_id.masked_fill(self.class_id < 0, num_classes)

    def __len__(self) -> int:
        return self.class_id.shape[0]
