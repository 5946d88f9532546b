"""What can be chosen about giving every weight of every expert its own number of bits; imports no torch."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from artifacts import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BitsConfig:
    """One budget of bytes for all experts, spent on the weights whose rounding moves the samples most."""

    method: Literal["bits"] = "bits"
    mean_bits: Annotated[float, Field(gt=0, le=16)] = 4.25
    """The budget: bits an entry of a large weight has in the mean over all experts, its share of the scales included,
    which is 16 / group."""
    choices: Annotated[tuple[Literal[2, 3, 4, 5, 6, 8], ...], Field(min_length=1)] = (2, 3, 4, 5, 6, 8)
    """Bits that a weight may get; with one choice all are alike."""
    group: Annotated[int, Field(ge=8, multiple_of=2)] = 64
    """Entries of a row that share a scale of 16 bits."""
    least: Annotated[int, Field(ge=1)] = 1024
    """Matrices with fewer entries stay as they are."""
    rows: Annotated[int, Field(ge=1)] = 64
    """Latents of its own cluster on which an expert is measured, all at once."""
    by_share: bool = True
    """Whether an expert counts as much as its cluster has samples; otherwise all count alike."""
    seed: int = 0
    """Of the measured latents, their noise and their t."""
