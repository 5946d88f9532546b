"""What can be chosen about looking into a finished ensemble: the audit and the classifier; imports no torch."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from artifacts import STRICT
from router.config import SelectionConfig

Quantile = Annotated[float, Field(gt=0, lt=1)]
Weighting = Literal["velocity", "likelihood"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AuditConfig:
    """How samples are compared with the training set."""

    quantiles: Annotated[tuple[Quantile, ...], Field(min_length=1)] = (0.01, 0.05)
    """A sample is near if it is nearer to the training set than this share of the held-out images."""
    suspects: Annotated[int, Field(ge=1)] = 8
    """Samples shown beside their nearest training images."""
    selection: SelectionConfig = SelectionConfig()
    """How the samples were drawn; a pinned selection tells which expert made which."""
    conditional: bool = False
    """Whether the samples were drawn with the classes of the held-out images."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ClassifierConfig:
    """How images are classified by denoising them."""

    images: Annotated[int, Field(ge=1)] = 256
    """Held-out images, as many from every cluster as it has."""
    draws: Annotated[int, Field(ge=1)] = 16
    """Values of t, each with a noise of its own, that an error is averaged over; the same for all classes."""
    weighting: Weighting = "velocity"
    """`velocity`: every t counts alike, as in Li et al. `likelihood`: as in the likelihood's bound."""
    batch_size: Annotated[int, Field(ge=1)] = 4096
    """Rows that go through a network at once."""
    seed: int = 0
    """Seed of t and noise."""
