"""When an expert of few steps is asked, and how a sample goes from each of these times to the next.

A student knows its own few t and no other. A trajectory may also begin below t = 1, with a draft noised to there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

StepType = Literal["euler", "renoise"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FewStepSchedule:
    """Stands in the place of a solver and its steps."""

    times: tuple[float, ...]
    """The falling t at which an expert is asked, the first of them where a sample begins; the last leads to 0."""
    step_types: tuple[StepType, ...]
    """How a sample goes on from each: along the velocity, or from the clean estimate with fresh noise."""
    is_distilled: bool = False
    """Whether what is said there was learned from an expert, so that data are no longer its target."""

    def __post_init__(self) -> None:
        """Refuse what leads nowhere."""
        if not self.times or any(a <= b for a, b in pairwise((*self.times, 0.0))) or self.times[0] > 1:
            raise ValueError(f"a course has times that fall from at most 1 and stay above 0; got {list(self.times)}")
        if len(self.step_types) != len(self.times) or any(way not in get_args(StepType) for way in self.step_types):
            raise ValueError(
                f"{len(self.times)} times need as many ways, euler or renoise; got {list(self.step_types)}"
            )

    @classmethod
    def uniform(cls, steps: int, way: StepType, *, start: float = 1.0, is_distilled: bool = False) -> "FewStepSchedule":
        """In equal steps from `start` down."""
        # Zhou et al. 2025, arXiv:2505.12674, section 3: t_i = t_init (1 - i / K).
        times = tuple(start * (1 - index / steps) for index in range(steps))
        return cls(times=times, step_types=(way,) * steps, is_distilled=is_distilled)

    def described(self) -> dict[str, Any]:
        """As JSON."""
        return {"times": list(self.times), "step_types": list(self.step_types), "is_distilled": self.is_distilled}

    @classmethod
    def parsed(cls, found: Mapping[str, Any]) -> "FewStepSchedule":
        """From JSON; raises `KeyError`, `TypeError` or `ValueError`."""
        return cls(
            times=tuple(float(t) for t in found["times"]),
            step_types=tuple(found["step_types"]),
            is_distilled=bool(found["is_distilled"]),
        )
