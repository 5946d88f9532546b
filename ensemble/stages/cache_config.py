"""What can be chosen about caches; imports no torch."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from artifacts import STRICT

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
    centre: Annotated[float, Field(ge=0, le=1)] | None = None
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
