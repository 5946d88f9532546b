"""The configuration of `ddm extend`: data that came after the clusters were made."""

from dataclasses import field
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from ddm_core.artifacts import STRICT, UNHASHED_IF_DEFAULT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DeliveryConfig:
    """Data of the same source and size as `data`, and how much the experts train when they have it."""

    path: str
    """As `data.path`."""
    version: str = field(default="", metadata=UNHASHED_IF_DEFAULT)
    """As `data.version`."""
    steps: Annotated[int, Field(ge=1)]
    """Optimizer steps of every expert, from its weights so far, on all data of its cluster."""
