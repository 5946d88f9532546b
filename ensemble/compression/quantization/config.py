"""What can be chosen about QuEST; imports no torch."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from ddm_core.artifacts import STRICT
from experts.config import TrainingConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MixedPrecisionConfig:
    """One budget of bytes for all experts, spent on the weights whose rounding moves the samples most."""

    method: Literal["mixed_precision"] = "mixed_precision"
    mean_bits: Annotated[float, Field(gt=0, le=16)] = 4.25
    """The budget: bits an entry of a large weight has in the mean over all experts, its share of the scales included,
    which is 16 / group."""
    choices: Annotated[tuple[Literal[2, 3, 4, 5, 6, 8], ...], Field(min_length=1)] = (2, 3, 4, 5, 6, 8)
    """Bits that a weight may get; with one choice all are alike."""
    group_size: Annotated[int, Field(ge=8, multiple_of=2)] = 64
    """Entries of a row that share a scale of 16 bits."""
    min_elements: Annotated[int, Field(ge=1)] = 1024
    """Matrices with fewer entries stay as they are."""
    rows: Annotated[int, Field(ge=1)] = 64
    """Latents of its own cluster on which an expert is measured, all at once."""
    by_share: bool = True
    """Whether an expert counts as much as its cluster has samples; otherwise all count alike."""
    seed: int = 0
    """Of the measured latents, their noise and their t."""


TUNING = TrainingConfig(steps=200, batch_size=32, lr=2e-4, warmup_steps=10)
"""At five times that learning rate the error of a transformer of width 384 rises instead of falling."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class QuESTConfig:
    """Layers of few bits, weights and activations alike, with grids for the activations of each time; then the layers
    that matter are trained to say what they said before."""

    method: Literal["quest"] = "quest"
    bits: Literal[4, 8] = 4
    """Bits of a weight; one scale a row."""
    activation_bits: Literal[4, 8] = 4
    """Bits of what a layer is given; one scale for all of it."""
    times: Annotated[int, Field(ge=1)] = 20
    """Times, evenly spread, at which activations are calibrated."""
    timewise: bool = True
    """Whether each of these times has a scale of its own; if not, all share one."""
    rows: Annotated[int, Field(ge=1)] = 32
    """Samples that calibrate at each time."""
    entries: Annotated[int, Field(ge=64)] = 2048
    """Entries of a layer's input, at each time, on which its scale is searched, at most."""
    convolutions: bool = True
    """Whether the convolutions of residual blocks are rounded as linear layers are; if not, they are only stored in
    few bits."""
    time_embedding: TrainingConfig | None = TUNING
    """How the layers that are told the time are trained; empty leaves them as they were rounded."""
    sensitive: TrainingConfig | None = TUNING
    """How feed-forward layers, queries, keys and values are trained after that; empty leaves them out."""
    trained_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the parameters that is trained at most: weights of layers whose gradient is largest for their size,"""
    vectors: bool = True
    """and before those the biases, scales and step sizes of all rounded layers, a hundredth of the parameters."""
    sensitive_convolutions: bool = False
    """Whether the convolutions that are rounded are trained along with those, which a U-Net has few of."""
    rest_bits: Literal[4, 8] | None = 8
    """Bits of all other large weights, which are only stored in few; empty leaves them as they are."""
    group_size: Annotated[int, Field(ge=2, multiple_of=2)] = 64
    """Entries of a row of those weights that share a scale."""
    min_elements: Annotated[int, Field(ge=1)] = 1024
    """Other weights with fewer entries stay as they are."""
    seed: int = 0
    """The calibrating samples are a function of it."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SharedBaseConfig:
    """Large weights as one base for all experts and a small difference for each; worth it for experts of one start."""

    method: Literal["shared_base"] = "shared_base"
    delta: Literal["low_rank", "packed", "tailors"] = "packed"
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
    group_size: Annotated[int, Field(ge=8, multiple_of=2)] = 64
    """Entries of a row that share a scale of 16 bits."""
    min_elements: Annotated[int, Field(ge=1)] = 1024
    """Matrices with fewer entries stay as they are."""


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
    group_size: Annotated[int, Field(ge=2, multiple_of=2)] = 64
    """Neighbours, of weights and of activations, that share a scale."""
    scaling: Literal["absmax", "mse"] = "absmax"
    """`absmax`: no weight is clipped. `mse`: the scale of least squared error, which takes six times as long
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
    min_elements: Annotated[int, Field(ge=1)] = 1024
    """Other weights with fewer entries stay as they are."""
    seed: int = 0
    """The calibrating samples are a function of it."""
