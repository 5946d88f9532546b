"""What can be chosen about sampling and scoring; imports no torch."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from artifacts import STRICT
from router.config import SelectionConfig

Solver = Literal["euler", "heun", "flow_match_euler", "flow_match_heun"]
FeatureSpace = Literal["pixels", "random_conv", "efficientnet_lite0"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SamplingConfig:
    """From noise to images."""

    solver: Solver = "heun"
    """The rule that integrates the velocity; `flow_match_*` are diffusers' schedulers."""
    steps: Annotated[int, Field(ge=1)] = 25
    """Solver steps; Heun calls the velocity twice a step."""
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0
    """uncond + scale * (cond - uncond); 1 means none and costs nothing."""
    selection: SelectionConfig = SelectionConfig()
    """Which experts speak."""
    batch_size: Annotated[int, Field(ge=1)] = 256
    """Images drawn at once; an image does not depend on it."""
    device: str = "cpu"
    """Torch device of the sampling."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluationConfig:
    """How samples are scored against held-out images."""

    num_samples: Annotated[int, Field(ge=16)] = 1000
    """Images drawn for every table row; never more than there are training images, which give the floor."""
    spaces: Annotated[tuple[FeatureSpace, ...], Field(min_length=1)] = ("pixels", "random_conv")
    """Feature spaces of the Fréchet distance, KID, precision and recall; a gain in one alone is not a gain."""
    components: Annotated[int, Field(ge=2)] = 64
    """Principal components of a space in which the Fréchet distance is taken; never more than half as many as
    there are held-out images or samples."""
    neighbours: Annotated[int, Field(ge=1)] = 3
    """k of precision and recall."""
    conditional: bool = False
    """Whether samples are drawn with the classes of the held-out images, or without a condition."""
    seed: int = 0
    """0 draws the seeds 0, 1, 2 …; another number draws none of those again."""
