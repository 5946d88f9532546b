"""What can be chosen about EcoDiff's pruning of heads and hidden units; imports no torch."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from ddm_core.artifacts import STRICT
from experts.config import TrainingConfig

MASK_TRAINING = TrainingConfig(steps=200, batch_size=8, lr=0.1, warmup_steps=5, log_every=10, checkpoint_every=20)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EcoDiffConfig:
    """Attention heads, hidden neurons and groups of hidden channels that matter least for the sample are taken out."""

    method: Literal["ecodiff"] = "ecodiff"
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """What is taken out, as a share of what `by` says."""
    by: Literal["units", "parameters"] = "units"
    """`units`: that share of all heads, of all hidden neurons and of all groups of channels, each by themselves.
    `parameters`: whatever is least, until that share of the whole network's parameters is gone."""
    criterion: Literal["learned", "magnitude", "random"] = "learned"
    """`learned`: logits of masks on whole trajectories. `magnitude`: root mean square of a unit's weights."""
    chain: Annotated[int, Field(ge=1)] = 10
    """Euler steps of a trajectory while masks are learned."""
    mask_training: TrainingConfig = MASK_TRAINING
    """How the logits are learned: iterations, trajectories each, learning rate, seed of their noise."""
    regulariser: Annotated[float, Field(ge=0)] = 0.05
    """Weight of the mean of sigmoid(logit) beside the distance of the masked sample, relative to the sample's size."""
    noise: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Width of the interval around 1/2 that a gate's uniform noise is drawn from; 0 is none."""
    start: float = 3.0
    """All logits before the first iteration."""
    finetune: TrainingConfig | None = None
    """How the smaller network then learns to say what the whole one says; empty leaves it as it is."""
    seed: int = 0
    """The random criterion and the measuring samples are functions of it."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LaptopConfig:
    """Layers are taken out whole, those first that the output misses least; then the rest learns from the whole one."""

    method: Literal["laptop"] = "laptop"
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the network's parameters that goes at least."""
    criterion: Literal["output_loss", "magnitude", "random"] = "output_loss"
    """By what layers are chosen; the last two are baselines."""
    rows: Annotated[int, Field(ge=1)] = 128
    """Samples on which the loss of each layer is measured."""
    additivity_sets: Annotated[int, Field(ge=0)] = 0
    """Random sets of layers on which it is checked that losses add up; 0 checks nothing."""
    finetune: TrainingConfig | None = field(
        default_factory=lambda: TrainingConfig(steps=400, batch_size=32, lr=5e-4, warmup_steps=20)
    )
    """How what is left is trained; empty leaves it as it is."""
    output_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the distance to the whole network's output in that training."""
    feature_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the distances to its features."""
    normalize: bool = True
    """Whether each of these is divided by the whole network's own mean square there."""
    seed: int = 0
    """Samples, random sets and the random criterion are functions of it."""
