"""What can be chosen about consistency training; imports no torch."""

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from ddm_core.artifacts import STRICT
from experts.config import TrainingConfig

CONSISTENCY_TRAINING = TrainingConfig(steps=2000, batch_size=64, lr=3e-4, warmup_steps=50, checkpoint_every=200)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ConsistencyConfig:
    """A student that calls all points of a trajectory by the same clean sample."""

    method: Literal["consistency"] = "consistency"
    students: Literal["per_expert", "shared"] = "per_expert"
    """One for each expert, from its own cluster; or one for all, without router and clusters."""
    steps: Annotated[int, Field(ge=1)] = 2
    """Times at which the student is asked, with fresh noise between."""
    training: TrainingConfig = CONSISTENCY_TRAINING
    """How it is trained; its distribution of t serves `t_choice` logit_normal alone."""
    teacher: bool = False
    """Whether the neighbouring point is found by a step of the expert (distillation) or the same noise (training)."""
    loss: Literal["cauchy", "pseudo_huber", "l2"] = "cauchy"
    """Distance of two clean estimates; the first bears outliers best."""
    c: Annotated[float, Field(gt=0)] = 0.02
    """Distance an entry beyond which it counts for less, at the coarsest discretisation."""
    adaptive_c: bool = True
    """Whether `c` falls as the discretisation becomes finer, as distances do."""
    coupling: bool = False
    """Whether noise is assigned to the samples of a batch by optimal transport; harms where latents are few numbers."""
    t_choice: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of t."""
    coarsest_intervals: Annotated[int, Field(ge=1)] = 10
    """Intervals of t at the beginning."""
    finest_intervals: Annotated[int, Field(ge=1)] = 160
    """Intervals of t at the end; they double in between."""
    diffusion_weight: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the distance to the sample itself at early t."""
    early: Annotated[float, Field(ge=0, le=1)] = 0.25
    """The t up to which it is added."""
    fixed_scales: bool = True
    """Whether the scales of layer norms are not trained, so that they cannot enlarge outliers."""

    @model_validator(mode="after")
    def _finer(self) -> "ConsistencyConfig":
        if self.finest_intervals < self.coarsest_intervals:
            raise ValueError(
                f"finest must be at least coarsest, {self.coarsest_intervals}, not {self.finest_intervals}; raise finest"
            )
        return self


FeatureKind = Literal["expert", "latents", "random_conv"]

MMD_TRAINING = TrainingConfig(steps=500, batch_size=128, lr=1e-4, warmup_steps=20, clip_norm=0.5, checkpoint_every=100)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MMDConfig:
    """The chain of few Euler steps is trained as a whole, until its samples are spread as the cluster's are."""

    method: Literal["mmd"] = "mmd"
    students: Literal["per_expert", "shared"] = "per_expert"
    """One for each expert, from its own cluster; or one for all, without router and clusters."""
    steps: Annotated[int, Field(ge=1)] = 5
    """Euler steps of the chain."""
    kernel: Literal["rbf", "poly3"] = "rbf"
    """Sum of Gaussians around the median distance, or a cubic polynomial, which is blind to most of a distribution of
    few features."""
    features: FeatureKind = "expert"
    """What the kernel sees: what the expert's middle says of latents, the latents themselves, or what filters that were
    never trained say of them."""
    across: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of its kernel that a pair of unlike conditions keeps; at 1 conditions do not matter."""
    training: TrainingConfig = MMD_TRAINING
    """How the chain is trained; a batch is as many samples as it is of the cluster's latents."""
    seed: int = 0
    """The random filters are a function of it."""


SID_TRAINING = TrainingConfig(
    steps=2000, batch_size=64, lr=1e-4, warmup_steps=50, t_mean=0.7, t_std=1.6, checkpoint_every=200
)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SiDConfig:
    """A student of few steps whose samples the expert takes for its own; needs none of the expert's data."""

    method: Literal["sid"] = "sid"
    students: Literal["per_expert", "shared"] = "per_expert"
    """One for each expert, from its own cluster; or one for all, without router and clusters."""
    steps: Annotated[int, Field(ge=1)] = 2
    """Times at which the student is asked."""
    start: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The first of them. Below 1 the student begins with weaker noise, of which it calls more a signal."""
    shared_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Turns in which one student learns from all experts at once; each expert's own then begins with it, not anew."""
    step_type: Literal["renoise", "euler"] = "renoise"
    """How it goes from one of them to the next: with fresh noise, or along its own velocity."""
    alpha: Annotated[float, Field(ge=0)] = 1.2
    """How much of the distance between the two scores itself is taken off the loss; 1.0 to 1.2."""
    weighting: Literal["signal", "one"] = "signal"
    """Weight of a t in the student's loss: the share of signal in a sample there, or the same for each."""
    training: TrainingConfig = SID_TRAINING
    """How student and fake score are trained: turns, samples each, and the distribution of t."""
    fake_score_updates: Annotated[int, Field(ge=1)] = 1
    """Steps of the fake score before each of the student's."""
    teacher_guidance: float = 1.0
    """Guidance of the expert while the student learns."""
    fake_guidance: float = 1.0
    """Guidance of the fake score while the student learns: the expert's is long-short guidance, 0 is zero guidance,
    below 0 is anti-guidance."""
    fake_training_guidance: float = 1.0
    """Guidance of the fake score while it learns itself."""

    @model_validator(mode="after")
    def _common_is_for_each(self) -> "SiDConfig":
        if self.shared_warmup_steps and self.students == "shared":
            raise ValueError(
                "shared_warmup_steps are for students of each expert; with students=shared set training.steps"
            )
        return self
