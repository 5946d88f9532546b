"""The configuration of `ddm finetune`: adapters of a run's experts, trained on a folder of images."""

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from data_partition.config import DataConfig
from ddm_core.artifacts import STRICT
from experts.config import TextConfig, TrainingConfig

ALL_IMAGES = "all"
"""Name of the images that every adapter reads."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FinetuneConfig:
    """Which experts get an adapter, and how it is trained."""

    images: str
    """Folder of the images."""
    content: str
    """Checksum of its files."""
    experts: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    """Ids of the experts."""
    is_routed: bool = True
    """Whether an expert trains on the images of its cluster alone; else on all."""
    rank: Annotated[int, Field(ge=1)] = 8
    """Rank of the adapters."""
    training: TrainingConfig = TrainingConfig(steps=500, batch_size=16, lr=1e-4)
    """Training of every adapter."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdapterImagesStageConfig:
    """The images of all adapters, encoded."""

    data: DataConfig
    """Where the images are, and the size of the run's."""
    content: str
    """Checksum of the images' files."""
    experts: tuple[int, ...]
    """The experts whose images are kept; empty keeps all images together."""
    text: TextConfig = TextConfig()
    """The encoder of the captions."""
    device: str = "cpu"
    """Torch device of both encoders."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AdapterStageConfig:
    """One adapter."""

    rank: Annotated[int, Field(ge=1)]
    """Rank of the change of every layer."""
    training: TrainingConfig
    """Its training."""
