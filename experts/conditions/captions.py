"""Captions of a data set: several a sample, encoded and stored without padding, gathered as rows of one length.

Captions that are not encoded yet are stored the same way, with the bytes of their text as tokens.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from experts.conditions.text_embedding import TextEmbedding


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedCaptions:
    """Captions of samples; caption i belongs to the sample whose range in `first_caption` contains i.

    All tensors may be memory-mapped files.
    """

    token_features: Float[Tensor, "token width"] | UInt8[Tensor, "token 1"]
    """Tokens of all captions, one caption after the other; or bytes in UTF-8 of those that are not encoded."""
    first_token: Int[Tensor, " caption_end"]
    """Position of the first token of every caption in `token_features`; the last entry is the number of tokens."""
    pooled: Float[Tensor, "caption pooled_width"]
    weight: Float[Tensor, " caption"]
    """Relative frequency of a caption among those of its sample; positive."""
    first_caption: Int[Tensor, " sample_end"]
    """Position of the first caption of every sample; equal neighbours are a sample without one."""
    null_text: TextEmbedding
    """The encoded "", one row, padded to the length of every text."""

    @classmethod
    def from_rows(
        cls,
        rows: TextEmbedding,
        null_text: TextEmbedding,
        counts: Int[Tensor, " sample"],
        weight: Float[Tensor, " row"],
    ) -> "EncodedCaptions":
        """Return the captions of samples, `counts` rows each, in numbers of 16 bits; rows of the null text are none."""
        is_caption = ~rows.is_null
        kept, sample = rows.rows(is_caption), torch.arange(len(counts)).repeat_interleave(counts)
        return cls(
            token_features=kept.sequence[kept.mask].half(),
            first_token=_offsets(kept.mask.sum(1)),
            pooled=kept.pooled.half(),
            weight=weight[is_caption],
            first_caption=_offsets(torch.bincount(sample[is_caption], minlength=len(counts))),
            null_text=null_text,
        )

    @classmethod
    def from_texts(
        cls,
        texts: Sequence[str],
        null_text: TextEmbedding,
        counts: Int[Tensor, " sample"],
        weight: Float[Tensor, " text"],
    ) -> "EncodedCaptions":
        """Return the captions of samples, `counts` texts each, without encoding them; blank texts are none."""
        is_caption = torch.tensor([bool(text.strip()) for text in texts], dtype=torch.bool)
        kept, sample = [text.encode() for text in texts if text.strip()], torch.arange(len(counts))
        return cls(
            token_features=torch.frombuffer(bytearray(b"".join(kept)), dtype=torch.uint8)[:, None]
            if kept
            else torch.zeros(0, 1, dtype=torch.uint8),
            first_token=_offsets(torch.tensor([len(text) for text in kept], dtype=torch.int64)),
            pooled=torch.zeros(len(kept), 0),
            weight=weight[is_caption],
            first_caption=_offsets(torch.bincount(sample.repeat_interleave(counts)[is_caption], minlength=len(counts))),
            null_text=null_text,
        )

    @property
    def are_texts(self) -> bool:
        """Return whether the captions are not encoded."""
        return self.token_features.dtype == torch.uint8

    def texts(self) -> list[str]:
        """Return the captions that are not encoded."""
        content, ends = self.token_features.numpy().tobytes(), self.first_token.tolist()
        return [content[start:end].decode() for start, end in itertools.pairwise(ends)]

    def choose(
        self, samples: Int[Tensor, " row"], uniforms: Float[Tensor, " row"]
    ) -> tuple[Int[Tensor, " row"], Bool[Tensor, " row"]]:
        """Draw a caption of each sample by weight, from numbers in [0, 1).

        Returns positions of captions, and which samples have one; the position of a sample without a caption is 0.
        """
        starts, ends = self.first_caption[samples], self.first_caption[samples + 1]
        has_caption = ends > starts
        positions = torch.where(has_caption, starts, 0)
        for row in (ends - starts > 1).nonzero().squeeze(-1).tolist():
            weights = self.weight[int(starts[row]) : int(ends[row])].double().cumsum(0)
            offset = int(torch.searchsorted(weights, uniforms[row].double() * weights[-1], right=True))
            positions[row] = starts[row] + min(offset, len(weights) - 1)
        return positions, has_caption

    def gather(self, captions: Int[Tensor, " row"], has_caption: Bool[Tensor, " row"]) -> TextEmbedding:
        """Return these captions as padded rows of float32; the null text where `has_caption` is false."""
        length, width, pooled_width = self.null_text.shape
        sequence = torch.zeros(len(captions), length, width)
        mask = torch.zeros(len(captions), length, dtype=torch.bool)
        pooled = torch.zeros(len(captions), pooled_width)
        rows = has_caption.nonzero().squeeze(-1)
        if len(rows):
            kept = captions[rows]
            starts, ends = self.first_token[kept], self.first_token[kept + 1]
            positions = starts[:, None] + torch.arange(length)
            is_token = positions < ends[:, None]
            features = self.token_features[positions[is_token]].float()
            filled = torch.zeros(len(rows), length, width)
            filled[is_token] = features
            sequence[rows], mask[rows], pooled[rows] = filled, is_token, self.pooled[kept].float()
        return TextEmbedding(sequence, mask, pooled, ~has_caption)

    def select(self, samples: Int[Tensor, " row"]) -> "EncodedCaptions":
        """Return the captions of these samples, in this order; one sample may occur several times."""
        captions = _ranges(self.first_caption[samples], self.first_caption[samples + 1])
        tokens = _ranges(self.first_token[captions], self.first_token[captions + 1])
        return EncodedCaptions(
            token_features=self.token_features[tokens],
            first_token=_offsets(self.first_token[captions + 1] - self.first_token[captions]),
            pooled=self.pooled[captions],
            weight=self.weight[captions],
            first_caption=_offsets(self.first_caption[samples + 1] - self.first_caption[samples]),
            null_text=self.null_text,
        )

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.first_caption) - 1


def _ranges(starts: Int[Tensor, " row"], ends: Int[Tensor, " row"]) -> Int[Tensor, " position"]:
    """Return all positions of the ranges [start, end), one range after the other."""
    lengths = ends - starts
    shifts = (starts - (lengths.cumsum(0) - lengths)).repeat_interleave(lengths)
    return torch.arange(int(lengths.sum())) + shifts


def _offsets(lengths: Int[Tensor, " row"]) -> Int[Tensor, " end"]:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
