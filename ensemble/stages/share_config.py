"""What can be chosen about storing all experts as one base and their differences; imports no torch."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from artifacts import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ShareConfig:
    """Large weights as one base for all experts and a small difference for each; worth it for experts of one start."""

    method: Literal["share"] = "share"
    difference: Literal["low_rank", "packed", "tailors"] = "packed"
    """`low_rank`: two thin matrices. `packed`: as many numbers as the weight, of few bits. `tailors`: own coefficients
    on shared singular directions, and two thin matrices for the rest."""
    base_bits: Literal[2, 3, 4, 5, 6, 8, 16] = 8
    """Bits of an entry of the base."""
    bits: Literal[2, 3, 4, 5, 6, 8, 16] = 4
    """Bits of an entry of a difference, or of its two matrices."""
    rank: Annotated[float, Field(gt=0, le=1)] = 0.125
    """Rank of a difference as a share of the weight's smaller side; of no meaning to `packed`."""
    directions: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Shared singular directions as a share of the weight's smaller side; of `tailors` alone. Fewer than all lose what
    the mean has beyond them, and only a difference of as many ranks brings it back."""
    rounds: Annotated[int, Field(ge=1)] = 3
    """How often the base and the differences of low rank are fitted to each other; 1 takes the mean as the base."""
    group: Annotated[int, Field(ge=8, multiple_of=2)] = 64
    """Entries of a row that share a scale of 16 bits."""
    least: Annotated[int, Field(ge=1)] = 1024
    """Matrices with fewer entries stay as they are."""
