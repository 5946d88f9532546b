"""What can be chosen about QuEST; imports no torch."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from artifacts import STRICT
from experts.config import TrainingConfig

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
    group: Annotated[int, Field(ge=2, multiple_of=2)] = 64
    """Entries of a row of those weights that share a scale."""
    least: Annotated[int, Field(ge=1)] = 1024
    """Other weights with fewer entries stay as they are."""
    seed: int = 0
    """The calibrating samples are a function of it."""
