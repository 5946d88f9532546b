"""The 0-1 knapsack of pruning: enough parameters go, and as little as possible is lost."""

import math
from collections.abc import Sequence


def knapsack(costs: Sequence[float], sizes: Sequence[int], target: int, buckets: int = 2000) -> list[int]:
    """Indices whose `sizes` add up to at least `target` at the least sum of `costs`, by dynamic programming.

    Sizes are rounded down to a `buckets`-th of the target, so the set is never too small; with as many buckets as the
    target is large it is the optimum. Raises `ValueError` if all sizes together are too small.
    """
    if sum(sizes) < target:
        raise ValueError(f"all units together have {sum(sizes):,} parameters, and {target:,} are to go; ask for fewer")
    unit = max(1, target // buckets)
    need = math.ceil(target / unit)
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ()), *[(math.inf, ())] * need]
    for index, (cost, size) in enumerate(zip(costs, sizes, strict=True)):
        for have in range(need, -1, -1):
            value, chosen = best[have]
            gained = min(need, have + size // unit)
            if value + cost < best[gained][0]:
                best[gained] = (value + cost, (*chosen, index))
    found = list(best[need][1])
    return found if math.isfinite(best[need][0]) else list(range(len(sizes)))
