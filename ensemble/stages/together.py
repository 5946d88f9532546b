"""What a stage that looks at all experts at once has made of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from experts.expert import Expert


@dataclass(frozen=True, slots=True, kw_only=True)
class Together:
    """The smaller experts, and what making them took."""

    experts: Mapping[int, Expert]
    modules: int
    """Weights that were changed, over all experts; 0 is an error of the stage."""
    flops: float
    """Of calibrating and searching."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What is worth looking at later, as JSON."""
