"""What can be chosen about caches; imports no torch."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from ddm_core.artifacts import STRICT
from experts.config import TrainingConfig

Policy = Literal["deepcache", "uniform", "adaptive", "unified"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CacheConfig:
    """Features of a network are kept from one step of a sample to the next."""

    method: Literal["cache"] = "cache"
    policy: Policy = "uniform"
    """`deepcache`: all but the outermost layers of a U-Net are kept. `uniform`: every module of `level` is computed at
    the same steps. `adaptive`: each at steps of its own, where what it says changes most. `unified`: all at the steps
    that are best for the first."""
    interval: Annotated[float, Field(ge=1)] = 3
    """A module is computed at one of so many steps, on average."""
    order: Annotated[int, Field(ge=0, le=2)] = 0
    """How a module goes on when it is not computed: 0 as it was, 1 and 2 by finite differences of what it said."""
    level: Literal["block", "layer", "unit"] = "layer"
    """What is kept, if not by `deepcache`: whole blocks, their attention, feed-forward and residual layers, or the
    linear layers and convolutions in these."""
    branch: Annotated[int, Field(ge=0)] = 0
    """How many of the outermost layers of each side `deepcache` computes at every step, besides the first and last."""
    center: Annotated[float, Field(ge=0, le=1)] | None = None
    """Around which share of the steps `deepcache` and `uniform` compute more often; empty spreads them evenly."""
    power: Annotated[float, Field(gt=1)] = 1.5
    """How much more often: the exponent of the distance from there."""
    bubbling: Annotated[int, Field(ge=0)] = 3
    """`adaptive`: so many modules, those that change most, have all feed-forward layers behind them computed along."""
    route_aware: bool = False
    """`adaptive` and `unified`: whether each expert has a schedule of its own; if not, all have the same."""
    rows: Annotated[int, Field(ge=1)] = 16
    """`adaptive` and `unified`: samples whose features are compared."""
    seed: int = 0
    """Their noise is a function of it."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HookConfig:
    """Features of a transformer are kept by one of diffusers' own hooks; needs a solver that calls once a step."""

    method: Literal["hook"] = "hook"
    hook: Literal["taylorseer", "first_block", "mag", "pyramid"] = "taylorseer"
    """Which one: TaylorSeer, first-block cache, MagCache or pyramid attention broadcast."""
    interval: Annotated[int, Field(ge=1)] = 3
    """`taylorseer`, `pyramid`: a layer is computed at one of so many steps; `mag`: so many less one are skipped in a
    row at most."""
    order: Annotated[int, Field(ge=0, le=3)] = 1
    """`taylorseer`: how many differences it goes on by."""
    threshold: Annotated[float, Field(gt=0)] = 0.1
    """`first_block`, `mag`: how much may change before a step is computed."""
    rows: Annotated[int, Field(ge=1)] = 8
    """Samples that calibrate `mag`, and whose FLOPs are counted."""
    seed: int = 0
    """Their noise is a function of it."""


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
    start_time_grid: Annotated[tuple[Start, ...], Field(min_length=1)] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
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
