"""What can be chosen about SVDQuant; imports no torch."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from artifacts import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SVDQuantConfig:
    """Linear layers of few bits, weights and activations alike, beside a low-rank branch of more.

    Without smoothing, branch and refinement it is plain rounding.
    """

    method: Literal["svdquant"] = "svdquant"
    bits: Literal[4, 8] = 4
    """Bits of the weights of attention and feed-forward layers."""
    activation_bits: Literal[4, 8] | None = 4
    """Bits of what these layers are given; empty leaves it as it is."""
    group: Annotated[int, Field(ge=2, multiple_of=2)] = 64
    """Neighbours, of weights and of activations, that share a scale."""
    scaling: Literal["largest", "least_error"] = "largest"
    """`largest`: no weight is clipped. `least_error`: the scale of least squared error, which takes six times as long
    and is better without refinement only."""
    smooth: bool = True
    """Whether outliers of the activations are moved into the weights."""
    rank: Annotated[int, Field(ge=0)] = 32
    """Rank of the branch; 0 is none."""
    branch_bits: Literal[8, 16] = 16
    """Bits of its weights: eight have twice the rank in the same bytes, and what they round off falls to the rest."""
    rank_share: Annotated[float, Field(gt=0, le=1)] = 0.125
    """The rank is at most this share of a layer's smaller side: a branch as wide as its layer saves nothing."""
    refine: Annotated[int, Field(ge=0)] = 100
    """Turns in which branch and residual are fitted to each other, at most."""
    patience: Annotated[int, Field(ge=1)] = 3
    """Turns without a smaller error after which that ends."""
    grid: Annotated[int, Field(ge=1)] = 20
    """Strengths of smoothing that are tried for each layer."""
    rows: Annotated[int, Field(ge=1)] = 64
    """Samples that calibrate."""
    tokens: Annotated[int, Field(ge=16)] = 1024
    """Inputs of a layer, of those samples, on which its error is measured, at most."""
    time_embedding: bool = False
    """Whether the linear layers that are told the time are split in the same way, what they are given left as it is."""
    rest_bits: Literal[4, 8] | None = 8
    """Bits of all other large weights, which are only stored in few; empty leaves them as they are."""
    least: Annotated[int, Field(ge=1)] = 1024
    """Other weights with fewer entries stay as they are."""
    seed: int = 0
    """The calibrating samples are a function of it."""
