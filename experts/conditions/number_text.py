"""Captions that are numbers, such as a reward: sines of a number instead of a language model's features.

An expert that was trained with the values of a regressor samples under a value: reward-directed generation (Yuan et al.
2023, arXiv:2307.07055; survey arXiv:2404.07771). Far above the values of the data, samples leave the data's support.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from experts.conditions.text_embedding import TextEmbedding
from experts.conditions.text_files import NUMBER_WIDTH, TextError

SHORTEST, LONGEST = 16.0, 4096.0
"""Waves; numbers whose distance is far below the shortest, a tenth or less, hardly differ."""


class NumberText(nn.Module):
    """The encoder of numbers; every token and the pooled vector are the same sines and cosines."""

    def __init__(self, length: int) -> None:
        super().__init__()
        waves = SHORTEST * (LONGEST / SHORTEST) ** torch.linspace(0, 1, NUMBER_WIDTH // 2, dtype=torch.float64)
        self.length, self.frequencies = length, 2 * math.pi / waves

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Return one token for every caption."""
        return [1] * len(captions)

    def encode(self, texts: list[str]) -> tuple[Float[Tensor, "text token width"], Float[Tensor, "text pooled_width"]]:
        """Return sequence and pooled vector of numbers, zeros for empty texts; raises `TextError` for any other."""
        angles = torch.tensor([[_read_number(text)] for text in texts], dtype=torch.float64) * self.frequencies
        is_empty = torch.tensor([not text.strip() for text in texts])
        pooled = torch.cat([angles.sin(), angles.cos()], 1).float().masked_fill(is_empty[:, None], 0)
        return pooled[:, None].repeat(1, self.length, 1), pooled

    def null_text(self) -> TextEmbedding:
        """Return the null text, one row of zeros."""
        return TextEmbedding.zeros(self.length, NUMBER_WIDTH, NUMBER_WIDTH)


def _read_number(text: str) -> float:
    try:
        number = float(text.strip() or 0)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise TextError(f"text=number reads captions that are finite numbers, and one is {text!r}; choose another text")
    return number
