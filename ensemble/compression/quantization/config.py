"""Settings of the quantization methods that need data or all experts at once; imports no torch."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from ddm_core.artifacts import STRICT
from ddm_core.seeds import Seed
from experts.config import TrainingConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MixedPrecisionConfig:
    """Weights in few bits, more bits for those whose rounding changes the output most, within one budget of bytes."""

    method: Literal["mixed_precision"] = "mixed_precision"
    mean_bits: Annotated[float, Field(gt=0, le=16)] = 4.25
    """The budget: mean bits per element of all large weights of all experts, including 16 / group_size for scales."""
    choices: Annotated[tuple[Literal[2, 3, 4, 5, 6, 8], ...], Field(min_length=1)] = (2, 3, 4, 5, 6, 8)
    """Bit widths that a weight can get; a single choice gives every weight the same."""
    group_size: Annotated[int, Field(ge=8, multiple_of=2)] = 64
    """Neighboring weights of a row that share one 16-bit scale."""
    min_elements: Annotated[int, Field(ge=1)] = 1024
    """Matrices with fewer elements are not quantized."""
    rows: Annotated[int, Field(ge=1)] = 64
    """Latents of its own cluster on which the error of an expert is measured, in one batch."""
    by_share: bool = True
    """Weight each expert by the size of its cluster; False weights all experts equally."""
    seed: Seed = 0
    """Seed of the measured latents, their noise and their t."""


TUNING = TrainingConfig(steps=200, batch_size=32, lr=2e-4, warmup_steps=10)
"""At five times that learning rate the error of a transformer of width 384 rises instead of falling."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class QuESTConfig:
    """Weights and activations in few bits, activation scales per timestep; the most sensitive layers are trained."""

    method: Literal["quest"] = "quest"
    bits: Literal[4, 8] = 4
    """Bits per weight, with one scale per row."""
    adaptive_rounding: bool = True
    """Choose for each weight whether it is rounded down or up (AdaRound); False rounds to nearest."""
    activation_bits: Literal[4, 8] = 4
    """Bits per activation: of the inputs of layers, and of queries, keys and values."""
    channelwise: bool = True
    """Give each channel of an activation its own scale; False uses one for all channels."""
    probability_bits: Literal[4, 8] | None = 8
    """Bits per attention probability, on a scale of their own; empty computes attention in full precision."""
    times: Annotated[int, Field(ge=1)] = 20
    """Evenly spaced times at which activation scales are calibrated."""
    timewise: bool = True
    """Give each of these times its own activation scales; False shares them among all times."""
    rows: Annotated[int, Field(ge=1)] = 32
    """Calibration samples per time."""
    tokens: Annotated[int, Field(ge=16)] = 512
    """Maximum number of inputs per layer, from those samples, on which its scales are searched."""
    convolutions: bool = True
    """Also quantize inputs of the convolutions in residual blocks; False only stores their weights in few bits."""
    time_embedding: TrainingConfig | None = TUNING
    """Training of the layers that receive the time embedding; empty skips it."""
    sensitive: TrainingConfig | None = TUNING
    """Training of feed-forward, query, key and value layers, which follows; empty skips it."""
    trained_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Maximum share of the parameters that is trained, besides step sizes and scales. Layers with the largest mean
    squared gradient come first."""
    vectors: bool = True
    """Also train the biases, scales and step sizes of all quantized layers."""
    sensitive_convolutions: bool = False
    """Also train quantized convolutions in the second training; useful for U-Nets, which have few linear layers."""
    rest_bits: Literal[4, 8] | None = 8
    """Bits per stored weight of all other large weights; empty keeps full precision."""
    group_size: Annotated[int, Field(ge=2, multiple_of=2)] = 64
    """Neighboring weights of a row of those that share one scale."""
    min_elements: Annotated[int, Field(ge=1)] = 1024
    """Other matrices with fewer elements are not quantized."""
    seed: Seed = 0
    """Seed of the calibration samples."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SharedBaseConfig:
    """Large weights stored as one base for all experts plus a small difference each; needs a common initialization."""

    method: Literal["shared_base"] = "shared_base"
    delta: Literal["low_rank", "packed", "tailors"] = "packed"
    """How differences are stored. `low_rank`: two thin matrices. `packed`: a full matrix in few bits. `tailors`: own
    coefficients on shared singular directions, and two thin matrices for the remainder."""
    base_bits: Literal[2, 3, 4, 5, 6, 8, 16] = 8
    """Bits per element of the base."""
    bits: Literal[2, 3, 4, 5, 6, 8, 16] = 4
    """Bits per element of a difference, or of its two thin matrices."""
    rank: Annotated[float, Field(gt=0, le=1)] = 0.125
    """Rank of a difference, as a share of the smaller side of the weight; unused by `packed`."""
    directions: Annotated[float, Field(gt=0, le=1)] = 1.0
    """`tailors`: shared singular directions, as a share of the smaller side of the weight. Below 1, the mean loses
    the part outside them, and only differences of that much more rank restore it."""
    rounds: Annotated[int, Field(ge=1)] = 3
    """Rounds in which base and low-rank differences are fitted to each other; 1 uses the mean as the base."""
    group_size: Annotated[int, Field(ge=8, multiple_of=2)] = 64
    """Neighboring weights of a row that share one 16-bit scale."""
    min_elements: Annotated[int, Field(ge=1)] = 1024
    """Matrices with fewer elements are not shared."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LearngenesConfig:
    """Large weights as a base and rank-one tailors, both for all experts, and the gates of each expert on the tailors.

    It needs a common initialization, as a `shared_base` of low rank, and has no more bits than that of the same `rank`.
    """

    method: Literal["learngenes"] = "learngenes"
    base_bits: Literal[2, 3, 4, 5, 6, 8, 16] = 8
    """Bits per element of the base."""
    bits: Literal[2, 3, 4, 5, 6, 8, 16] = 8
    """Bits per element of the tailors."""
    rank: Annotated[float, Field(gt=0, le=1)] = 0.125
    """Tailors per expert, as a share of the smaller side of the weight."""
    learn_gates: bool = True
    """Fit the gates of every expert on all tailors; False leaves each tailor to the expert that it was found in."""
    rounds: Annotated[int, Field(ge=1)] = 60
    """Rounds in which base, tailors and gates are fitted to the weights by least squares."""
    training: TrainingConfig | None = TUNING
    """Training of base, tailors and gates on the outputs of the experts, which follows and is kept if it lowers their
    error; empty skips it."""
    align_weight: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the alignment of the features after the first third of the blocks with those of the expert; 0: none."""
    group_size: Annotated[int, Field(ge=8, multiple_of=2)] = 64
    """Neighboring weights of a row that share one 16-bit scale."""
    min_elements: Annotated[int, Field(ge=1)] = 1024
    """Matrices with fewer elements are not shared."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SVDQuantConfig:
    """Linear layers with weights and activations in few bits, plus a low-rank branch in higher precision.

    Without smoothing, branch and refinement it is plain rounding.
    """

    method: Literal["svdquant"] = "svdquant"
    bits: Literal[4, 8] = 4
    """Bits per weight of attention and feed-forward layers."""
    activation_bits: Literal[4, 8] | None = 4
    """Bits per activation of these layers; empty keeps full precision."""
    group_size: Annotated[int, Field(ge=2, multiple_of=2)] = 64
    """Neighboring weights, or activations, that share one scale."""
    scaling: Literal["absmax", "mse"] = "absmax"
    """`absmax`: no weight is clipped. `mse`: scales of least squared error, six times slower and better only without
    refinement."""
    smooth: bool = True
    """Move outliers of the activations into the weights."""
    rank: Annotated[int, Field(ge=0)] = 32
    """Rank of the branch; 0 disables it."""
    branch_bits: Literal[8, 16] = 16
    """Bits per weight of the branch. 8 bits hold twice the rank in equal bytes; the residual absorbs their rounding."""
    rank_share: Annotated[float, Field(gt=0, le=1)] = 0.125
    """Maximum rank as a share of the smaller side of a layer; a branch as wide as its layer saves nothing."""
    refine: Annotated[int, Field(ge=0)] = 100
    """Maximum number of iterations that fit branch and residual to each other."""
    patience: Annotated[int, Field(ge=1)] = 3
    """Iterations without a smaller error after which refinement stops."""
    grid: Annotated[int, Field(ge=1)] = 20
    """Smoothing strengths tried per layer."""
    rows: Annotated[int, Field(ge=1)] = 64
    """Calibration samples."""
    tokens: Annotated[int, Field(ge=16)] = 1024
    """Maximum number of inputs per layer, from those samples, on which its error is measured."""
    time_embedding: bool = False
    """Also split the linear layers that receive the time embedding; their activations keep full precision."""
    rest_bits: Literal[4, 8] | None = 8
    """Bits per stored weight of all other large weights; empty keeps full precision."""
    min_elements: Annotated[int, Field(ge=1)] = 1024
    """Other matrices with fewer elements are not quantized."""
    seed: Seed = 0
    """Seed of the calibration samples."""
