"""Cache schedules: which modules of a network are computed at which steps of a trajectory.

On the other steps a module's cached output is used. A schedule for each module, by its path, covers DeepCache,
adaptive caching and feature inheritance.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

from ddm_core.errors import DDMError
from experts.compressed.caching.diffusers_hooks import CacheHook

TIME_TOLERANCE = 1e-5
"""Two t that differ by no more than this are the same step."""


class CacheStepError(DDMError, ValueError):
    """A trajectory has a step that the cache was not made for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSchedule:
    """The content of `cache.json` in an expert's folder."""

    times: tuple[float, ...]
    """The falling t of the steps that the schedule was made for."""
    compute_steps: Mapping[str, tuple[int, ...]]
    """The steps at which each module, by its path, is computed. New samples are always computed."""
    order: int = 0
    """0 returns the latest output; 1 and 2 extrapolate it by finite differences of that order."""
    relative_flops: tuple[float, ...] = ()
    """FLOPs of each step as a share of those of a full one; as many as there are times."""
    hook: CacheHook | None = None
    """One of diffusers' hooks, which replaces `compute_steps` and `order`."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for inconsistent fields."""
        count = len(self.times)
        if not count or any(a <= b for a, b in zip(self.times, self.times[1:], strict=False)):
            raise ValueError(f"a cache needs falling times; got {list(self.times)[:5]}")
        if self.order not in (0, 1, 2):
            raise ValueError(f"cache order must be 0, 1 or 2; got {self.order}")
        if len(self.relative_flops) != count or any(not 0 <= cost <= 1 for cost in self.relative_flops):
            raise ValueError(f"{count} times need {count} costs from 0 to 1; got {list(self.relative_flops)[:5]}")
        if any(not 0 <= step < count for steps in self.compute_steps.values() for step in steps):
            raise ValueError(f"compute steps must be from 0 to {count - 1}; got {dict(self.compute_steps)!r:.100}")

    def index(self, t: float) -> int:
        """Return the step at `t`; raise `CacheStepError` if there is none."""
        step = bisect_left(self.times, -t - TIME_TOLERANCE, key=lambda time: -time)
        if step < len(self.times) and abs(self.times[step] - t) <= TIME_TOLERANCE:
            return step
        raise CacheStepError(
            f"this cache was made for {len(self.times)} steps from t = {self.times[0]:g}, and none of them is "
            f"at t = {t:g}; sample with as many steps of the same solver, or make the cache again"
        )
