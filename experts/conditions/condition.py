"""Conditions of samples: a class and a text; null is a value of both, not a missing argument."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from experts.conditions.text_embedding import TextEmbedding

NULL_CLASS = -1


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition a row."""

    class_id: Int[Tensor, " batch"]
    """Class of every row; -1 is the null condition."""
    text: TextEmbedding | None = None
    """Text of every row; None is the null text in all rows."""
    guidance: "tuple[Float[Tensor, ' batch'], Condition] | None" = None
    """Scale and negative condition of every row, for networks that are guided in one call; None is no guidance."""

    @classmethod
    def null(cls, batch: int, device: torch.device | str = "cpu") -> "Condition":
        """Return the null condition for `batch` rows."""
        return cls(torch.full((batch,), NULL_CLASS, dtype=torch.int64, device=device))

    @classmethod
    def of_classes(cls, class_ids: Sequence[int]) -> "Condition":
        """Return the condition of these classes, without text; -1 is the null condition."""
        return cls(torch.tensor(list(class_ids), dtype=torch.int64))

    @classmethod
    def concatenate(cls, parts: Sequence["Condition"]) -> "Condition":
        """Return the rows of all parts, in order."""
        class_id = torch.cat([part.class_id for part in parts])
        like = next((part.text for part in parts if part.text is not None), None)
        if like is None:
            return cls(class_id)
        texts = [TextEmbedding.all_null(len(part), like) if part.text is None else part.text for part in parts]
        return cls(class_id, TextEmbedding.concatenate(texts))

    def rows(self, index: Int[Tensor, " row"] | Bool[Tensor, " batch"] | slice) -> "Condition":
        """Return the selected rows."""
        guidance = self.guidance and (self.guidance[0][index], self.guidance[1].rows(index))
        return Condition(self.class_id[index], None if self.text is None else self.text.rows(index), guidance)

    def guided(self, scale: "Float[Tensor, ' batch'] | float", negative: "Condition | None" = None) -> "Condition":
        """Return the condition with guidance away from a negative one, which is null by default."""
        scales = torch.as_tensor(scale, dtype=torch.float32, device=self.class_id.device).expand(len(self))
        return replace(self, guidance=(scales, negative or Condition.null(len(self), self.class_id.device)))

    def drop(self, mask: Bool[Tensor, " batch"]) -> "Condition":
        """Return the condition with null where `mask` is true."""
        return Condition(
            self.class_id.masked_fill(mask, NULL_CLASS), None if self.text is None else self.text.drop(mask)
        )

    def drop_one(self, uniforms: Float[Tensor, " batch"]) -> "Condition":
        """Return the condition with one part dropped in half of the rows that have both, by numbers in [0, 1).

        Below 1/4 the class, from 3/4 the text: a model of both then follows either of them alone.
        """
        has_both = (self.class_id >= 0) & ~self.has_null_text
        class_id = self.class_id.masked_fill(has_both & (uniforms < 0.25), NULL_CLASS)
        return Condition(class_id, None if self.text is None else self.text.drop(has_both & (uniforms >= 0.75)))

    def to(self, device: torch.device | str) -> "Condition":
        """Return the condition on another device; the copy from pinned memory does not wait for the device."""
        class_id = self.class_id.to(device, non_blocking=self.class_id.is_pinned())
        guidance = self.guidance and (self.guidance[0].to(device), self.guidance[1].to(device))
        return Condition(class_id, None if self.text is None else self.text.to(device), guidance)

    def pin_memory(self) -> "Condition":
        """Return the condition in pinned memory."""
        return Condition(self.class_id.pin_memory(), None if self.text is None else self.text.pin_memory())

    def embedding_index(self, num_classes: int) -> Int[Tensor, " batch"]:
        """Return rows of a class embedding; null is row `num_classes`, after all classes."""
        return self.class_id.masked_fill(self.class_id < 0, num_classes)

    @property
    def is_null(self) -> Bool[Tensor, " batch"]:
        """Return the rows that have neither a class nor a text."""
        return (self.class_id < 0) & self.has_null_text

    @property
    def has_null_text(self) -> Bool[Tensor, " batch"]:
        """Return the rows that have no text."""
        return torch.ones_like(self.class_id, dtype=torch.bool) if self.text is None else self.text.is_null

    def filled(self, null_text: TextEmbedding | None) -> "Condition":
        """Return the condition with the values of a network's null text in the rows without text.

        `null_text` is None for a network without text.

        Raises `ValueError` for a text of other shapes than the network's, or for a network that reads no text.
        """
        if null_text is None:
            if self.text is not None:
                raise ValueError("this network was trained without text; leave the text out of the condition")
            return self
        guidance = None if self.guidance is None else (self.guidance[0], self.guidance[1].filled(null_text))
        text = TextEmbedding.all_null(len(self), null_text.to(self.class_id.device)) if self.text is None else self.text
        if text.shape != null_text.shape:
            raise ValueError(
                "this network takes texts of (tokens, features, pooled features) "
                f"{null_text.shape}, not {text.shape}; pad the text to its length, and use its text encoder"
            )
        return Condition(self.class_id, text.fill_null(null_text), guidance)

    def __len__(self) -> int:
        return self.class_id.shape[0]
