"""What a stage does to one expert: a function of the expert, its own cluster's latents and a configuration."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from artifacts import Workspace
from ensemble.ensemble import Speaker
from experts.expert import Expert
from experts.latents import LatentDataset


class StageError(ValueError):
    """A stage cannot do what it was asked to do with this ensemble."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A smaller expert, and what making it took."""

    expert: Speaker
    modules: int
    """Weights, layers or whatever the method works on, that it has changed; 0 is an error of the stage."""
    flops: float
    """Of calibrating, searching and training again."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What is worth looking at later, as JSON."""

    @property
    def network(self) -> Expert:
        """The expert, if it is one network; `TypeError` if it is not."""
        if not isinstance(self.expert, Expert):
            raise TypeError(f"a {type(self.expert).__name__} is not one network")
        return self.expert


Method = Callable[[Expert, LatentDataset, Any, Workspace], Outcome]
"""(expert, latents of its own cluster, configuration, this expert's workspace) to a smaller one.

The expert that is given is not changed. Raises `StageError` if nothing would change, `Preempted` between two steps.
"""
