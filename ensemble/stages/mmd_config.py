"""What can be chosen about fine-tuning a short chain by MMD; imports no torch."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from artifacts import STRICT
from experts.config import TrainingConfig

FeatureKind = Literal["expert", "latents", "random_conv"]

MMD_TRAINING = TrainingConfig(steps=500, batch_size=128, lr=1e-4, warmup_steps=20, clip_norm=0.5, checkpoint_every=100)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MMDConfig:
    """The chain of few Euler steps is trained as a whole, until its samples are spread as the cluster's are."""

    method: Literal["mmd"] = "mmd"
    students: Literal["each", "one"] = "each"
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
