"""What can be chosen about choosing a selection; imports no torch."""

from typing import Annotated

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from artifacts import STRICT
from router.config import AUTO, SelectionConfig

CANDIDATES = (
    SelectionConfig(name="sticky"),
    SelectionConfig(name="redraw", t_switch=0.5),
    SelectionConfig(name="sticky_at", t_switch=0.5),
    SelectionConfig(name="sticky_at", t_switch=0.8),
    SelectionConfig(name="coupled"),
    SelectionConfig(name="switch"),
    SelectionConfig(name="top_k", k=1),
    SelectionConfig(name="threshold"),
    SelectionConfig(name="full"),
)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ChoiceConfig:
    """How the selection `auto` is turned into one with a name: a short trial of each candidate."""

    candidates: Annotated[tuple[SelectionConfig, ...], Field(min_length=1)] = CANDIDATES
    """What is tried; of equals the first is chosen."""
    num_samples: Annotated[int, Field(ge=16)] = 500
    """Images drawn with each candidate, from seeds that no score draws."""
    steps: Annotated[int, Field(ge=1)] = 10
    """Solver steps of each of them."""
    most_calls: Annotated[float, Field(ge=1)] = 1.25
    """Expert calls that the chosen one may make on average for one evaluation of a velocity; both branches of guidance
    may make as many each."""

    @model_validator(mode="after")
    def _has_rules(self) -> "ChoiceConfig":
        """The choice is among rules."""
        if any(candidate.name == AUTO for candidate in self.candidates):
            raise ValueError("choice.candidates are what `auto` is chosen from, so `auto` is none: leave it out")
        return self
