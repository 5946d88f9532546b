"""What can be chosen about trajectories that begin with a draft; imports no torch."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from artifacts import STRICT
from experts.config import TrainingConfig

DRAFT_TRAINING = TrainingConfig(steps=1000, batch_size=128, lr=2e-3, warmup_steps=50)

Start = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TruncateConfig:
    """A trajectory begins at some t below 1 with a cheap draft, which the expert refines in a few steps."""

    method: Literal["truncate"] = "truncate"
    draft: Literal["student", "expert", "anchors", "autoregressive"] = "anchors"
    """`student`: the distilled ensemble. `expert`: the expert itself in `draft_steps` steps. `anchors`: centroids of
    its cluster. `autoregressive`: a recurrent network that learns its cluster, one row of a latent after the other."""
    steps: Annotated[int, Field(ge=1)] = 2
    """Euler steps of the expert from there."""
    t_start: Start | None = None
    """The t to which drafts are noised; empty searches it among those below."""
    tried: Annotated[tuple[Start, ...], Field(min_length=1)] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    """From each of these, samples are compared with the expert's own latents by MMD."""
    rows: Annotated[int, Field(ge=16)] = 512
    """Samples that are compared."""
    draft_steps: Annotated[int, Field(ge=1)] = 2
    """Euler steps of the draft `expert`."""
    anchors: Annotated[int, Field(ge=1)] = 64
    """Centroids of the draft `anchors`, never more than the cluster has samples."""
    width: Annotated[int, Field(ge=8)] = 128
    """Features of the network of the draft `autoregressive`."""
    training: TrainingConfig = DRAFT_TRAINING
    """How that is trained."""
    seed: int = 0
    """Centroids, and the noise of what is compared, are functions of it."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BaseFirstConfig:
    """The first step by the ensemble that the students were distilled from, the others by them."""

    method: Literal["base_first"] = "base_first"
    base_steps: Annotated[int, Field(ge=1)] = 1
    """Euler steps of that ensemble in the place of the students' first one."""
