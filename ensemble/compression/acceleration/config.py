"""Settings of feature caches, truncated sampling and base-first students; imports no torch."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from ddm_core.artifacts import STRICT
from ddm_core.seeds import Seed
from experts.config import TrainingConfig

Policy = Literal["deepcache", "uniform", "adaptive", "unified"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CacheConfig:
    """Reuses a network's features from one sampling step to the next."""

    method: Literal["cache"] = "cache"
    policy: Policy = "uniform"
    """`deepcache`: cache all but the outermost layers of a U-Net. `uniform`: compute all modules of `level` at the same
    steps. `adaptive`: compute each module at the steps where its output changes most. `unified`: use the best steps of
    the first module for all."""
    interval: Annotated[float, Field(ge=1)] = 3
    """Mean number of steps from one computation of a module to the next."""
    order: Annotated[int, Field(ge=0, le=2)] = 0
    """Order of the Taylor series that extrapolates cached outputs; 0 reuses them unchanged."""
    level: Literal["block", "layer", "unit"] = "layer"
    """What is cached, except by `deepcache`. `block`: whole blocks. `layer`: their attention, feed-forward and residual
    layers. `unit`: the linear layers and convolutions in these."""
    branch: Annotated[int, Field(ge=0)] = 0
    """`deepcache`: outermost layers on each side that are computed at every step, besides the first and the last."""
    center: Annotated[float, Field(ge=0, le=1)] | None = None
    """`deepcache`, `uniform`: position in the trajectory, as a share of its steps, around which modules are computed
    more often; empty spaces the computations evenly."""
    power: Annotated[float, Field(gt=1)] = 1.5
    """How strongly computations cluster around `center`: the exponent of the distance to it."""
    bubbling: Annotated[int, Field(ge=0)] = 3
    """`adaptive`: number of modules with the largest changes; whenever one of them is computed, so are all modules
    behind it but attention."""
    route_aware: bool = False
    """`adaptive`, `unified`: give each expert its own schedule; False gives all experts the same."""
    rows: Annotated[int, Field(ge=1)] = 16
    """`adaptive`, `unified`: samples whose features are compared."""
    seed: Seed = 0
    """Seed of the noise of these samples."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HookConfig:
    """Caches features of a transformer with a hook of diffusers; needs a solver with one evaluation per step."""

    method: Literal["hook"] = "hook"
    hook: Literal["taylorseer", "first_block", "mag", "pyramid", "faster"] = "taylorseer"
    """The hook: TaylorSeer, first-block cache, MagCache, pyramid attention broadcast or FasterCache's attention."""
    interval: Annotated[int, Field(ge=1)] = 3
    """`taylorseer`, `pyramid`, `faster`: steps from one computation of a layer to the next. `mag`: one more than the
    maximum number of steps skipped in a row."""
    order: Annotated[int, Field(ge=0, le=3)] = 1
    """`taylorseer`: order of the Taylor series that extrapolates cached outputs."""
    threshold: Annotated[float, Field(gt=0)] = 0.1
    """`first_block`, `mag`: maximum change for which a step is skipped."""
    rows: Annotated[int, Field(ge=1)] = 8
    """Samples that calibrate `mag` and whose FLOPs are counted."""
    seed: Seed = 0
    """Seed of the noise of these samples."""


DRAFT_TRAINING = TrainingConfig(steps=1000, batch_size=128, lr=2e-3, warmup_steps=50)
REFINER_TRAINING = TrainingConfig(steps=500, batch_size=64, lr=3e-4, warmup_steps=50)

Start = Annotated[float, Field(gt=0, lt=1)]
GridStart = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TruncateConfig:
    """Starts sampling below t = 1 from a noised draft, which is cheap; the expert refines it in few steps."""

    method: Literal["truncate"] = "truncate"
    draft: Literal["student", "expert", "anchors", "autoregressive"] = "anchors"
    """What generates the draft. `student`: the distilled ensemble. `expert`: the expert in `draft_steps` steps.
    `anchors`: centroids of the cluster, by their shares in a class, or by a head that reads the texts.
    `autoregressive`: a recurrent network trained on the cluster, which generates a
    latent row by row."""
    steps: Annotated[int, Field(ge=1)] = 2
    """Euler steps in which the expert refines the draft."""
    t_start: Start | None = None
    """Time to which drafts are noised; empty searches `start_time_grid` for the best."""
    start_time_grid: Annotated[tuple[GridStart, ...], Field(min_length=1)] = tuple(n / 10 for n in range(11))
    """Start times to try besides 0, the unrefined draft, and 1, the expert's steps from noise. Each is scored by the
    MMD between samples and held-out latents of the cluster."""
    rows: Annotated[int, Field(ge=16)] = 512
    """Samples per score, at least."""
    draft_steps: Annotated[int, Field(ge=1)] = 2
    """`expert`: Euler steps of the draft."""
    anchors: Annotated[int, Field(ge=1)] = 64
    """`anchors`: number of centroids, at most one per sample of the cluster."""
    width: Annotated[int, Field(ge=8)] = 128
    """`autoregressive`, and `anchors` with texts: hidden width of the network or the head."""
    training: TrainingConfig = DRAFT_TRAINING
    """`autoregressive`, and `anchors` with texts: training of the network or the head."""
    tune: Literal["no", "data", "anchors"] = "no"
    """Train a copy of each expert below its start time. `data`: on noised samples. `anchors`: from noised anchors to
    the samples nearest to them. The copies are kept if they lower the held-out score."""
    tuning: TrainingConfig = REFINER_TRAINING
    """`tune`: that training."""
    seed: Seed = 0
    """Seed of the centroids and of the noise of scored samples."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BaseFirstConfig:
    """The original experts take the first step, their students take the others."""

    method: Literal["base_first"] = "base_first"
    base_steps: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    """Euler steps of the original experts that replace the first step of the students. `auto`: the fewest of 1, 2, 3, 4
    whose held-out recall is `min_recall` of the original experts', or the best."""
    guidance: float | None = None
    """Guidance scale of these steps; empty is that of the run."""
    min_recall: Annotated[float, Field(gt=0, le=1)] = 0.95
    """`auto`: the least share of the original experts' recall."""
    rows: Annotated[int, Field(ge=16)] = 512
    """`auto`: samples whose recall is measured, at most as many as there are held-out latents."""
