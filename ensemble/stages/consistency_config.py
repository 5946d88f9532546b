"""What can be chosen about consistency training; imports no torch."""

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from artifacts import STRICT
from experts.config import TrainingConfig

CONSISTENCY_TRAINING = TrainingConfig(steps=2000, batch_size=64, lr=3e-4, warmup_steps=50, checkpoint_every=200)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ConsistencyConfig:
    """A student that calls all points of a trajectory by the same clean sample."""

    method: Literal["consistency"] = "consistency"
    students: Literal["each", "one"] = "each"
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
    coarsest: Annotated[int, Field(ge=1)] = 10
    """Intervals of t at the beginning."""
    finest: Annotated[int, Field(ge=1)] = 160
    """Intervals of t at the end; they double in between."""
    diffusion_weight: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the distance to the sample itself at early t."""
    early: Annotated[float, Field(ge=0, le=1)] = 0.25
    """The t up to which it is added."""
    fixed_scales: bool = True
    """Whether the scales of layer norms are not trained, so that they cannot enlarge outliers."""

    @model_validator(mode="after")
    def _finer(self) -> "ConsistencyConfig":
        if self.finest < self.coarsest:
            raise ValueError(f"finest must be at least coarsest, {self.coarsest}, not {self.finest}; raise finest")
        return self
