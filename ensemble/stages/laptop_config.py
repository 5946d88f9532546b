"""What can be chosen about taking layers out; imports no torch."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from artifacts import STRICT
from experts.config import TrainingConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LaptopConfig:
    """Layers are taken out whole, those first that the output misses least; then the rest learns from the whole one."""

    method: Literal["laptop"] = "laptop"
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the network's parameters that goes at least."""
    criterion: Literal["output_loss", "magnitude", "random"] = "output_loss"
    """By what layers are chosen; the last two are baselines."""
    rows: Annotated[int, Field(ge=1)] = 128
    """Samples on which the loss of each layer is measured."""
    additivity_sets: Annotated[int, Field(ge=0)] = 0
    """Random sets of layers on which it is checked that losses add up; 0 checks nothing."""
    retraining: TrainingConfig | None = field(
        default_factory=lambda: TrainingConfig(steps=400, batch_size=32, lr=5e-4, warmup_steps=20)
    )
    """How what is left is trained; empty leaves it as it is."""
    output_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the distance to the whole network's output in that training."""
    feature_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the distances to its features."""
    normalise: bool = True
    """Whether each of these is divided by the whole network's own mean square there."""
    seed: int = 0
    """Samples, random sets and the random criterion are functions of it."""
