"""Which modules of a network are computed at which evaluations of a trajectory; at the others their features are kept.

One mechanism for DeepCache, adaptive caching and feature inheritance: a schedule for each module, by its path.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from experts.compressed.caching.diffusers_hooks import CacheHook

CLOSE = 1e-5
"""Two t that are as near as this are the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSchedule:
    """Stands as `cache.json` in an expert's folder."""

    times: tuple[float, ...]
    """The falling t of the evaluations that it was made for."""
    compute_steps: Mapping[str, tuple[int, ...]]
    """By a module's path: at which of them it is computed. It is always computed for samples that are new."""
    order: int = 0
    """0 takes what a module last said, 1 and 2 go on from what it said before by finite differences."""
    relative_flops: tuple[float, ...] = ()
    """FLOPs of each evaluation over those of a full one; as many as there are times."""
    hook: CacheHook | None = None
    """One of diffusers' hooks in the place of `updates` and `order`."""

    def __post_init__(self) -> None:
        """Refuse what is no plan."""
        count = len(self.times)
        if not count or any(a <= b for a, b in zip(self.times, self.times[1:], strict=False)):
            raise ValueError(f"a cache needs falling times; got {list(self.times)[:5]}")
        if self.order not in (0, 1, 2):
            raise ValueError(f"a cache goes on by order 0, 1 or 2; got {self.order}")
        if len(self.relative_flops) != count or any(not 0 <= cost <= 1 for cost in self.relative_flops):
            raise ValueError(f"{count} times need {count} costs from 0 to 1; got {len(self.relative_flops)}")
        if any(not 0 <= step < count for steps in self.compute_steps.values() for step in steps):
            raise ValueError(f"modules are computed at some of the evaluations 0 ... {count - 1}, not at others")

    def index(self, t: float) -> int:
        """Which evaluation is at `t`; `ValueError` if none is."""
        found = bisect_left(self.times, -t - CLOSE, key=lambda time: -time)
        if found < len(self.times) and abs(self.times[found] - t) <= CLOSE:
            return found
        raise ValueError(
            f"this cache was made for {len(self.times)} evaluations from t = {self.times[0]:g} on, and none of them is "
            f"at t = {t:g}; sample with as many steps of the same solver, or make the cache again"
        )

    def described(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "times": list(self.times),
            "compute_steps": {path: list(steps) for path, steps in self.compute_steps.items()},
            "order": self.order,
            "relative_flops": list(self.relative_flops),
        } | ({} if self.hook is None else {"hook": self.hook.described()})

    @classmethod
    def parsed(cls, found: Mapping[str, Any]) -> "CacheSchedule":
        """From JSON; raises `KeyError`, `TypeError` or `ValueError`."""
        return cls(
            times=tuple(float(t) for t in found["times"]),
            compute_steps={str(path): tuple(int(i) for i in steps) for path, steps in found["compute_steps"].items()},
            order=int(found["order"]),
            relative_flops=tuple(float(cost) for cost in found["relative_flops"]),
            hook=CacheHook.parsed(found["hook"]) if "hook" in found else None,
        )
