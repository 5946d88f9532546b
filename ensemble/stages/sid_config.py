"""What can be chosen about score identity distillation; imports no torch."""

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from artifacts import STRICT
from experts.config import TrainingConfig

SID_TRAINING = TrainingConfig(
    steps=2000, batch_size=64, lr=1e-4, warmup_steps=50, t_mean=0.7, t_std=1.6, checkpoint_every=200
)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SiDConfig:
    """A student of few steps whose samples the expert takes for its own; needs none of the expert's data."""

    method: Literal["sid"] = "sid"
    students: Literal["each", "one"] = "each"
    """One for each expert, from its own cluster; or one for all, without router and clusters."""
    steps: Annotated[int, Field(ge=1)] = 2
    """Times at which the student is asked."""
    start: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The first of them. Below 1 the student begins with weaker noise, of which it calls more a signal."""
    common_steps: Annotated[int, Field(ge=0)] = 0
    """Turns in which one student learns from all experts at once; each expert's own then begins with it, not anew."""
    renoise: Literal["fresh", "euler"] = "fresh"
    """How it goes from one of them to the next: with fresh noise, or along its own velocity."""
    alpha: Annotated[float, Field(ge=0)] = 1.2
    """How much of the distance between the two scores itself is taken off the loss; 1.0 to 1.2."""
    weighting: Literal["signal", "one"] = "signal"
    """Weight of a t in the student's loss: the share of signal in a sample there, or the same for each."""
    training: TrainingConfig = SID_TRAINING
    """How student and fake score are trained: turns, samples each, and the distribution of t."""
    fake_updates: Annotated[int, Field(ge=1)] = 1
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
        if self.common_steps and self.students == "one":
            raise ValueError("common_steps are for students of each expert; with students=one set training.steps")
        return self
