"""Few-step schedules: the few t at which a distilled expert is evaluated, and the step from each to the next.

A student is trained at its own few t only. A trajectory may also start below t = 1, from a draft that is noised to
there.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from torch import Tensor

StepType = Literal["euler", "renoise", "average"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FewStepSchedule:
    """Replaces a solver and its step count."""

    times: tuple[float, ...]
    """The falling t at which an expert is evaluated; sampling starts at the first, and the last step ends at 0."""
    step_types: tuple[StepType, ...]
    """How each step proceeds: `euler` follows the velocity, `average` the mean velocity up to the next t, which a
    network with intervals predicts, and `renoise` adds fresh noise to the clean estimate."""
    is_distilled: bool = False
    """Whether the expert was distilled, so that its target is no longer the data."""

    def __post_init__(self) -> None:
        """Check that times fall to 0 and that every one has a step type; raise `ValueError` otherwise."""
        if not self.times or any(a <= b for a, b in pairwise((*self.times, 0.0))) or self.times[0] > 1:
            raise ValueError(f"few-step times must fall from at most 1 and stay above 0; got {list(self.times)}")
        is_known = all(step_type in get_args(StepType) for step_type in self.step_types)
        if len(self.step_types) != len(self.times) or not is_known:
            raise ValueError(
                f"{len(self.times)} times need as many step types of {', '.join(get_args(StepType))}; got "
                f"{list(self.step_types)}"
            )

    @classmethod
    def uniform(
        cls, steps: int, step_type: StepType, *, start: float = 1.0, is_distilled: bool = False
    ) -> "FewStepSchedule":
        """Return equal steps from `start` to 0."""
        # Zhou et al. 2025, arXiv:2505.12674, section 3: t_i = t_init (1 - i / K).
        times = tuple(start * (1 - index / steps) for index in range(steps))
        return cls(times=times, step_types=(step_type,) * steps, is_distilled=is_distilled)

    def jump_lengths(self, t: Tensor) -> Tensor | None:
        """Return how far each `average` step goes that starts at t, one of the times; None without such steps."""
        if "average" not in self.step_types:
            return None
        ends = [
            end if step_type == "average" else start
            for start, end, step_type in zip(self.times, (*self.times[1:], 0.0), self.step_types, strict=True)
        ]
        index = (t[:, None] - t.new_tensor(self.times)).abs().argmin(1)
        return t - t.new_tensor(ends)[index]
