"""Settings of the distillation methods; imports no torch."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from ddm_core.artifacts import STRICT, UNHASHED_IF_DEFAULT
from ddm_core.seeds import Seed
from experts.config import TrainingConfig


def _check_whole_batch(training: TrainingConfig) -> TrainingConfig:
    if training.accumulate > 1:
        raise ValueError(
            f"a distillation's losses need the whole batch at once; got accumulate={training.accumulate}; set it to 1"
        )
    return training


def _check_has_own_students(shared_warmup_steps: int, students: str) -> None:
    if shared_warmup_steps and students == "shared":
        raise ValueError(
            "distill.shared_warmup_steps applies to one student per expert; with distill.students=shared set "
            "distill.training.steps"
        )


WholeBatchTraining = Annotated[TrainingConfig, AfterValidator(_check_whole_batch)]
CONSISTENCY_TRAINING = TrainingConfig(steps=2000, batch_size=64, lr=3e-4, warmup_steps=50, checkpoint_every=200)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ConsistencyConfig:
    """A few-step student that predicts the same clean sample from every point of a trajectory."""

    method: Literal["consistency"] = "consistency"
    students: Literal["per_expert", "shared"] = "per_expert"
    """`per_expert`: one student per expert, trained on its cluster. `shared`: one for all, without router."""
    steps: Annotated[int, Field(ge=1)] = 2
    """Sampling steps of the student, with fresh noise in between."""
    training: WholeBatchTraining = CONSISTENCY_TRAINING
    """Training of the student; its distribution of t applies only to t_choice=logit_normal."""
    teacher: bool = False
    """Compute the neighboring point with a step of the expert (distillation) instead of the same noise (training)."""
    loss: Literal["cauchy", "pseudo_huber", "l2"] = "cauchy"
    """Distance between two clean estimates; `cauchy` is the most robust to outliers."""
    c: Annotated[float, Field(gt=0)] = 0.02
    """Distance per element above which the robust losses grow more slowly, at the coarsest discretization."""
    adaptive_c: bool = True
    """Lower `c` as the discretization becomes finer, as distances do."""
    coupling: bool = True
    """Assign noise to the samples of a batch by optimal transport; turn it off for latents of a few elements, where
    the assigned noise would no longer be that of the sampler's steps."""
    t_choice: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of t."""
    coarsest_intervals: Annotated[int, Field(ge=1)] = 10
    """Intervals of t at the start of training."""
    finest_intervals: Annotated[int, Field(ge=1)] = 160
    """Intervals of t at the end of training; the number doubles in between."""
    diffusion_weight: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the distance to the clean sample, which is added at small t."""
    early: Annotated[float, Field(ge=0, le=1)] = 0.25
    """The largest t at which it is added."""
    fixed_scales: bool | None = None
    """Freeze the scales of layer, group and root-mean-square norms, so that they cannot amplify outliers; empty freezes
    those that the network has, and true fails if it has none."""
    shared_warmup_steps: Annotated[int, Field(ge=0)] = field(default=0, metadata=UNHASHED_IF_DEFAULT)
    """Training steps of one shared student on all clusters, from which each expert's student then starts; 0 starts from
    the expert."""
    shared_start: Literal["student", "change"] = field(default="student", metadata=UNHASHED_IF_DEFAULT)
    """`student`: start from the shared student. `change`: from the expert plus what the shared training changed, for
    experts of one common start."""
    adapter_rank: Annotated[int, Field(ge=1)] | None = field(default=None, metadata=UNHASHED_IF_DEFAULT)
    """Train only an adapter of this rank in the linear and convolutional layers of each expert's student; empty trains
    all parameters."""

    @model_validator(mode="after")
    def _check_warmup(self) -> "ConsistencyConfig":
        _check_has_own_students(self.shared_warmup_steps, self.students)
        if self.shared_start == "change" and not self.shared_warmup_steps:
            raise ValueError(
                "distill.shared_start=change adds what a shared training changed, and distill.shared_warmup_steps=0 "
                "has none; set shared_warmup_steps"
            )
        return self

    @model_validator(mode="after")
    def _check_intervals(self) -> "ConsistencyConfig":
        if self.finest_intervals < self.coarsest_intervals:
            raise ValueError(
                f"finest_intervals must be at least coarsest_intervals, {self.coarsest_intervals}, but is "
                f"{self.finest_intervals}; raise finest_intervals"
            )
        return self


FeatureKind = Literal["expert", "latents", "random_conv"]

MMD_TRAINING = TrainingConfig(steps=500, batch_size=128, lr=1e-4, warmup_steps=20, clip_norm=0.5, checkpoint_every=100)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MMDConfig:
    """A few-step student, fine-tuned through all its steps until its samples are distributed as the cluster's."""

    method: Literal["mmd"] = "mmd"
    students: Literal["per_expert", "shared"] = "per_expert"
    """`per_expert`: one student per expert, trained on its cluster. `shared`: one for all, without router."""
    steps: Annotated[int, Field(ge=1)] = 5
    """Euler steps of the student."""
    kernel: Literal["rbf", "poly3"] = "rbf"
    """`rbf`: sum of Gaussians around the median distance. `poly3`: a cubic polynomial, which misses most differences
    between distributions of few features."""
    features: FeatureKind = "expert"
    """Input of the kernel. `expert`: features of the expert's middle stage. `latents`: the latents themselves.
    `random_conv`: features of fixed random convolutions."""
    across: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Kernel weight of pairs with different conditions; 1 ignores conditions."""
    training: WholeBatchTraining = MMD_TRAINING
    """Training of the student; each batch compares as many samples as latents of the cluster."""
    seed: Seed = 0
    """Seed of the random convolutions."""


SID_TRAINING = TrainingConfig(
    steps=2000, batch_size=64, lr=1e-4, warmup_steps=50, t_mean=0.7, t_std=1.6, checkpoint_every=200
)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SiDConfig:
    """A few-step student, trained by score identity distillation (SiD) from the expert alone, without its data."""

    method: Literal["sid"] = "sid"
    students: Literal["per_expert", "shared"] = "per_expert"
    """`per_expert`: one student per expert, trained on its cluster. `shared`: one for all, without router."""
    steps: Annotated[int, Field(ge=1)] = 2
    """Sampling steps of the student."""
    start: Annotated[float, Field(gt=0, le=1)] = 1.0
    """First time of the student. Below 1, it starts with weaker noise and treats more of it as signal."""
    shared_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Training steps of one shared student, from which each expert's student then starts; 0 starts from the expert."""
    step_type: Literal["renoise", "euler"] = "renoise"
    """How the student moves to its next time: `renoise` adds fresh noise, `euler` follows its own velocity."""
    alpha: Annotated[float, Field(ge=0)] = 1.2
    """Weight of the squared distance between the two scores that the loss subtracts; 1.0 to 1.2."""
    weighting: Literal["signal", "one"] = "signal"
    """Weight of a time in the student's loss: `signal` is the share of signal in a noised sample, `one` is constant."""
    training: WholeBatchTraining = SID_TRAINING
    """Training of student and fake score, including the distribution of t; `betas` are always (0, 0.999)."""
    fake_score_updates: Annotated[int, Field(ge=1)] = 1
    """Updates of the fake score before each update of the student."""
    teacher_guidance: float = 1.0
    """Guidance scale of the expert in the student's loss."""
    fake_guidance: float = 1.0
    """Guidance scale of the fake score in the student's loss. Long-short guidance: as the expert's. Zero guidance: 0.
    Anti-guidance: below 0."""
    fake_training_guidance: float = 1.0
    """Guidance scale of the fake score in its own training."""

    @model_validator(mode="after")
    def _check_warmup(self) -> "SiDConfig":
        _check_has_own_students(self.shared_warmup_steps, self.students)
        return self


WarmedConfig = SiDConfig | ConsistencyConfig
"""Methods whose students may start from one shared student."""

MEAN_FLOW_TRAINING = TrainingConfig(
    steps=2000, batch_size=64, lr=3e-4, warmup_steps=50, t_mean=0.4, t_std=1.6, checkpoint_every=200
)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MeanFlowConfig:
    """A student that predicts the average velocity from any t to any earlier one, so that a jump is one call."""

    method: Literal["mean_flow"] = "mean_flow"
    students: Literal["per_expert", "shared"] = "per_expert"
    """`per_expert`: one student per expert, trained on its cluster. `shared`: one for all, without router."""
    steps: Annotated[int, Field(ge=1)] = 1
    """Jumps of the student from noise to clean."""
    training: WholeBatchTraining = MEAN_FLOW_TRAINING
    """Training of the student; both ends of a jump are drawn from its distribution of t."""
    velocity: Literal["student", "data", "expert"] = "student"
    """Where the velocity in the target comes from. `data`: noise and sample (MeanFlow). `student`: the same, but the
    derivative follows the student's own velocity, which has less variance (iMF). `expert`: the expert's velocity."""
    velocity_share: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of the batch that trains on the velocity itself, a jump of no length; empty is .5, and 0 with the expert's
    velocity, which the student has from the start."""
    derivative_step: Annotated[float, Field(ge=0, le=0.25)] = 0.1
    """The derivative is taken over t plus and minus this step; 0 takes it exactly, by forward-mode differentiation,
    with all ripples of the network's embedding of t."""
    power: Annotated[float, Field(ge=0, le=1)] | None = None
    """Rows count by their squared error to minus this power; 0 is the plain squared error. Empty is 1, and .5 with the
    expert's velocity, where short jumps have hardly an error and would count most."""
    guidance: float = 1.0
    """Guidance scale of the velocity that is averaged; guided samples then cost one call a jump too."""
    max_guidance: Annotated[float, Field(gt=1)] | None = field(default=None, metadata=UNHASHED_IF_DEFAULT)
    """Train for every guidance scale from 1 to this one, which becomes an input of the student: samples then have the
    run's guidance, or any other, at one call a jump. Empty trains for `guidance` alone."""

    @model_validator(mode="after")
    def _check_guidance(self) -> "MeanFlowConfig":
        if self.max_guidance is not None and self.guidance != 1:
            raise ValueError(
                f"distill.max_guidance={self.max_guidance} makes guidance an input, and distill.guidance="
                f"{self.guidance} fixes it; leave one of them out"
            )
        return self


SCM_TRAINING = TrainingConfig(
    steps=2000, batch_size=64, lr=3e-4, warmup_steps=50, t_mean=-0.3, t_std=1.4, checkpoint_every=200
)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SCMConfig:
    """A consistency student in the limit of neighboring points, distilled from the expert."""

    method: Literal["scm"] = "scm"
    students: Literal["per_expert", "shared"] = "per_expert"
    """`per_expert`: one student per expert, trained on its cluster. `shared`: one for all, without router."""
    steps: Annotated[int, Field(ge=1)] = 2
    """Sampling steps of the student, with fresh noise in between."""
    training: WholeBatchTraining = SCM_TRAINING
    """Training of the student; the logarithm of the noise-to-signal ratio is Gaussian with its `t_mean`, `t_std`."""
    tangent_warmup_steps: Annotated[int, Field(ge=0)] = 500
    """Steps over which the part of the tangent that needs the network's derivative grows to its full size."""
    derivative_step: Annotated[float, Field(ge=0, le=0.1)] = 0.02
    """The derivative is taken over the angle s plus and minus this step; 0 takes it exactly, by forward-mode
    differentiation, with all ripples of the network's embedding of t."""
    tangent_offset: Annotated[float, Field(gt=0)] = 0.1
    """c of the normalized tangent g / (|g| + c)."""
    guidance: float = 1.0
    """Guidance scale of the expert."""
    score_weight: Annotated[float, Field(ge=0)] = field(default=0.0, metadata=UNHASHED_IF_DEFAULT)
    """Weight of score distillation on the student's own samples beside consistency (rCM); 0 leaves it out."""


SIGN_TRAINING = TrainingConfig(
    steps=2000, batch_size=64, lr=3e-4, warmup_steps=50, t_mean=0.7, t_std=1.6, checkpoint_every=200
)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SignConfig:
    """A one-step student that maps noise and corrupted latents alike to data, and leaves data as they are."""

    method: Literal["sign"] = "sign"
    students: Literal["per_expert", "shared"] = "per_expert"
    """`per_expert`: one student per expert, trained on its cluster. `shared`: one for all, without router."""
    steps: Literal[1] = 1
    """Sampling steps of the student."""
    training: WholeBatchTraining = SIGN_TRAINING
    """Training of student and fake score, including the distribution of t, of both the scores and the corruption."""
    data_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the distance from the student of latents, half of them corrupted, to the latents."""
    idempotence_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the distance from the student of its own samples to these samples."""
    flow_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the distance to the samples of the expert from the same noise."""
    flow_steps: Annotated[int, Field(ge=1)] = 8
    """Heun steps of the expert for these samples."""
    guidance: float = 1.0
    """Guidance scale of the expert."""


SPEEDUP_TRAINING = TrainingConfig(steps=2000, batch_size=64, lr=1e-3, warmup_steps=50, checkpoint_every=200)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SpeedUpNetConfig:
    """Guidance at any scale and with any negative condition in one call, by branches of the expert's layers."""

    method: Literal["speedup"] = "speedup"
    students: Literal["per_expert"] = "per_expert"
    """Every expert has branches of its own, trained on its cluster."""
    training: WholeBatchTraining = SPEEDUP_TRAINING
    """Training of the branches; the expert's own parameters stay as they are."""
    rank: Annotated[int, Field(ge=1)] = 32
    """Hidden features of a branch."""
    max_guidance: Annotated[float, Field(gt=1)] = 6.0
    """Largest guidance scale of the training."""
    null_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of rows with the null condition as the negative one; the others have that of another row."""
    steps: Annotated[int, Field(ge=0)] = 0
    """Number of steps of a sample, each of which is trained to reach where `substeps` guided steps of the expert lead.
    0: any solver and number of steps, by calls that are trained to be guided calls."""
    substeps: Annotated[int, Field(ge=2)] = 4
    """Guided steps of two calls, in place of each of `steps`."""
