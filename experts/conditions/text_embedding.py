"""Encoded captions as networks read them; the null text is a row of its own, whose values each network supplies."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TextEmbedding:
    """One caption a row, padded to one length that is part of the model: several backbones read the padding too."""

    sequence: Float[Tensor, "batch token width"]
    """One vector for each token."""
    mask: Bool[Tensor, "batch token"]
    """True for tokens, false for padding."""
    pooled: Float[Tensor, "batch pooled_width"]
    """One vector for the whole caption."""
    is_null: Bool[Tensor, " batch"]
    """Rows of the null text; their other values are 0, and `fill_null` replaces them."""

    @classmethod
    def zeros(cls, length: int, width: int, pooled_width: int) -> "TextEmbedding":
        """Return one null row of zeros, all of it tokens, in place of an encoded "" where only shapes matter."""
        ones = torch.ones(1, length, dtype=torch.bool)
        return cls(torch.zeros(1, length, width), ones, torch.zeros(1, pooled_width), ones[:, 0])

    @classmethod
    def all_null(cls, batch: int, like: "TextEmbedding") -> "TextEmbedding":
        """Return `batch` null rows with the shapes, types and device of `like`."""
        return cls(
            like.sequence.new_zeros(batch, *like.sequence.shape[1:]),
            like.mask.new_zeros(batch, *like.mask.shape[1:]),
            like.pooled.new_zeros(batch, *like.pooled.shape[1:]),
            like.is_null.new_ones(batch),
        )

    @classmethod
    def concatenate(cls, parts: Sequence["TextEmbedding"]) -> "TextEmbedding":
        """Return the rows of all parts, in order."""
        return cls(
            torch.cat([part.sequence for part in parts]),
            torch.cat([part.mask for part in parts]),
            torch.cat([part.pooled for part in parts]),
            torch.cat([part.is_null for part in parts]),
        )

    def rows(self, index: Int[Tensor, " row"] | Bool[Tensor, " batch"] | slice) -> "TextEmbedding":
        """Return the selected rows."""
        return TextEmbedding(self.sequence[index], self.mask[index], self.pooled[index], self.is_null[index])

    def drop(self, dropped: Bool[Tensor, " batch"]) -> "TextEmbedding":
        """Return the rows with the null text where `dropped` is true."""
        return TextEmbedding(
            self.sequence.masked_fill(dropped[:, None, None], 0),
            self.mask & ~dropped[:, None],
            self.pooled.masked_fill(dropped[:, None], 0),
            self.is_null | dropped,
        )

    def fill_null(self, null_text: "TextEmbedding") -> "TextEmbedding":
        """Return the rows with the values of `null_text`, the one row of the encoded "", in place of the null text."""
        is_null = self.is_null
        return TextEmbedding(
            torch.where(is_null[:, None, None], null_text.sequence.to(self.sequence), self.sequence),
            torch.where(is_null[:, None], null_text.mask.to(self.mask.device), self.mask),
            torch.where(is_null[:, None], null_text.pooled.to(self.pooled), self.pooled),
            is_null,
        )

    def to(self, device: torch.device | str) -> "TextEmbedding":
        """Return the rows on another device; the copy from pinned memory does not wait for the device."""
        parts = (self.sequence, self.mask, self.pooled, self.is_null)
        return TextEmbedding(*(part.to(device, non_blocking=part.is_pinned()) for part in parts))

    def pin_memory(self) -> "TextEmbedding":
        """Return the rows in pinned memory."""
        return TextEmbedding(*(part.pin_memory() for part in (self.sequence, self.mask, self.pooled, self.is_null)))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (tokens of a row, features of a token, features of the pooled vector)."""
        return self.sequence.shape[1], self.sequence.shape[2], self.pooled.shape[1]

    def __len__(self) -> int:
        return self.is_null.shape[0]
