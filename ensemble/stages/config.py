"""What can be chosen about making an ensemble smaller; imports no torch."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from artifacts import STRICT
from ensemble.config import SamplingConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class QuantizeConfig:
    """Weights in few bits, rounded to nearest; activations stay as they are."""

    bits: Literal[4, 8] = 8
    """Bits of a weight."""
    group: Annotated[int, Field(ge=8, multiple_of=2)] = 64
    """Entries of a row that share a scale of 16 bits."""
    least: Annotated[int, Field(ge=1)] = 1024
    """Matrices with fewer entries stay as they are."""
    router: bool = True
    """Whether the router is quantized too."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class QuantizeStageConfig:
    """One quantization of an ensemble, and how its samples are compared."""

    quantize: QuantizeConfig
    """What is rounded."""
    sampling: SamplingConfig
    """How both ensembles are sampled."""
    num_samples: Annotated[int, Field(ge=1)] = 64
    """Images that are compared."""
