"""Few-step schedules: the few t at which a distilled expert is evaluated, and the step from each to the next.

A student is trained at its own few t only. A trajectory may also start below t = 1, from a draft that is noised to
there.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

StepType = Literal["euler", "renoise"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FewStepSchedule:
    """Replaces a solver and its step count."""

    times: tuple[float, ...]
    """The falling t at which an expert is evaluated; sampling starts at the first, and the last step ends at 0."""
    step_types: tuple[StepType, ...]
    """How each step proceeds: `euler` follows the velocity, `renoise` adds fresh noise to the clean estimate."""
    is_distilled: bool = False
    """Whether the expert was distilled, so that its target is no longer the data."""

    def __post_init__(self) -> None:
        """Check that times fall to 0 and that every one has a step type; raise `ValueError` otherwise."""
        if not self.times or any(a <= b for a, b in pairwise((*self.times, 0.0))) or self.times[0] > 1:
            raise ValueError(f"few-step times must fall from at most 1 and stay above 0; got {list(self.times)}")
        is_known = all(step_type in get_args(StepType) for step_type in self.step_types)
        if len(self.step_types) != len(self.times) or not is_known:
            raise ValueError(
                f"{len(self.times)} times need as many step types, euler or renoise; got {list(self.step_types)}"
            )

    @classmethod
    def uniform(
        cls, steps: int, step_type: StepType, *, start: float = 1.0, is_distilled: bool = False
    ) -> "FewStepSchedule":
        """Return equal steps from `start` to 0."""
        # Zhou et al. 2025, arXiv:2505.12674, section 3: t_i = t_init (1 - i / K).
        times = tuple(start * (1 - index / steps) for index in range(steps))
        return cls(times=times, step_types=(step_type,) * steps, is_distilled=is_distilled)
