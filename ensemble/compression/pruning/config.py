"""Settings of the pruning methods; imports no torch."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from ddm_core.artifacts import STRICT
from ddm_core.seeds import Seed
from experts.config import TrainingConfig

MASK_TRAINING = TrainingConfig(steps=200, batch_size=8, lr=0.1, warmup_steps=5, log_every=10, checkpoint_every=20)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EcoDiffConfig:
    """Removes the attention heads, hidden neurons and groups of hidden channels that change samples least."""

    method: Literal["ecodiff"] = "ecodiff"
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the units or parameters (see `by`) that is removed."""
    by: Literal["units", "parameters"] = "units"
    """`units`: remove `ratio` of all heads, of all hidden neurons and of all channel groups, each kind separately.
    `parameters`: remove units of any kind, lowest score first, until `ratio` of the network's parameters is gone."""
    criterion: Literal["learned", "magnitude", "random"] = "learned"
    """How units are scored. `learned`: mask logits trained along full trajectories. `magnitude`: root mean square of a
    unit's weights. `random`: a baseline."""
    chain: Annotated[int, Field(ge=1)] = 10
    """Euler steps of a trajectory in mask training."""
    mask_training: TrainingConfig = MASK_TRAINING
    """Training of the mask logits; the batch size counts trajectories."""
    regulariser: Annotated[float, Field(ge=0)] = 0.05
    """Weight of mean sigmoid(logit) in the loss, next to the relative distance between masked and original samples."""
    noise: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Width of the interval around 1/2 from which the uniform noise of a gate is sampled; 0 disables the noise."""
    start: float = 3.0
    """Initial value of all mask logits."""
    finetune: TrainingConfig | None = None
    """Training of the pruned network to match the original's outputs; empty skips it."""
    seed: Seed = 0
    """Seed of the random criterion and of the samples that measure the result."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LaptopConfig:
    """Removes the layers that change the output least, and fine-tunes the rest against the original network."""

    method: Literal["laptop"] = "laptop"
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Minimum share of the network's parameters that is removed."""
    criterion: Literal["output_loss", "magnitude", "random"] = "output_loss"
    """How layers are scored. `output_loss`: change of the output without the layer. The others are baselines."""
    rows: Annotated[int, Field(ge=1)] = 128
    """Samples on which the output loss of each layer is measured."""
    additivity_sets: Annotated[int, Field(ge=0)] = 0
    """Random sets of layers that check whether losses are additive; 0 skips the check."""
    finetune: TrainingConfig | None = field(
        default_factory=lambda: TrainingConfig(steps=400, batch_size=32, lr=5e-4, warmup_steps=20)
    )
    """Fine-tuning of the remaining layers; empty skips it."""
    output_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the distance to the original's output in fine-tuning."""
    feature_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the distances to the original's features in fine-tuning."""
    normalize: bool = True
    """Divide each feature distance by the mean square of the original's features."""
    seed: Seed = 0
    """Seed of the samples, the random sets and the random criterion."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AssemblyConfig:
    """Assembles a network of less FLOPs from the kept layers of each block, and distils it."""

    method: Literal["assembly"] = "assembly"
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Share of the network's FLOPs that is removed, to within .01: whole layers, then units of others."""
    order: Literal["shallow", "output_loss", "random"] = "output_loss"
    """Which layers are removed first. `shallow`: those of most FLOPs per parameter, one of each block in turn, as the
    paper does. `output_loss`: those whose absence changes the output least per FLOP. `random`: a baseline."""
    rows: Annotated[int, Field(ge=1)] = 128
    """Samples on which the output loss of each layer is measured."""
    incubation: TrainingConfig | None = None
    """Training of each shortened block alone, behind the blocks before it and in front of original ones; empty skips
    it, which was better in as many steps."""
    kernels: Annotated[int, Field(ge=1, le=16)] = 1
    """Kernels of each layer next to a removed one, merged into one by the time of a call; 1 keeps plain layers."""
    inherit: bool = True
    """Begin with the kernels of removed layers of the same shape beside the layer's own; False begins with copies."""
    finetune: TrainingConfig | None = field(
        default_factory=lambda: TrainingConfig(steps=400, batch_size=32, lr=5e-4, warmup_steps=20)
    )
    """Fine-tuning of the assembled network; empty skips it."""
    output_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the distance to the original's output in both trainings."""
    feature_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the distances to the original's features in both trainings."""
    semantic_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight in both trainings of the relative distance between features of the clean samples that both networks
    estimate; the features are those of the original's middle stage."""
    normalize: bool = True
    """Divide each feature distance by the mean square of the original's features."""
    seed: Seed = 0
    """Seed of the samples and of the random order."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RegionalConfig:
    """Lets self-attention over large maps read the tokens of a region and a summary of every other region."""

    method: Literal["regional"] = "regional"
    min_tokens: Annotated[int, Field(ge=4)] = 256
    """Tokens of the smallest map that is divided; attention over smaller ones stays."""
    region: Annotated[int, Field(ge=2)] | None = None
    """Side of a region in tokens; empty takes the one with the fewest keys, which reads n + N / n of N."""
    rows: Annotated[int, Field(ge=1)] = 128
    """Samples that give the weights of the features, and on which errors are measured."""
    finetune: TrainingConfig | None = field(
        default_factory=lambda: TrainingConfig(steps=400, batch_size=32, lr=5e-4, warmup_steps=20)
    )
    """Fine-tuning of the divided network; empty skips it."""
    output_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the distance to the original's output in fine-tuning."""
    feature_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the distances to the original's features in fine-tuning."""
    normalize: bool = True
    """Divide each feature distance by the mean square of the original's features."""
    seed: Seed = 0
    """Seed of the samples."""
