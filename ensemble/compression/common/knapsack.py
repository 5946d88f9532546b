"""One option of every item, at the least cost within a budget: the multiple-choice knapsack.

Greedily along the lower convex hull of each item's options, the best saving for the size first; the solution of the
linear relaxation but for one item (Sinha & Zoltners 1979, The multiple-choice knapsack problem).
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What an item may be."""

    size: int
    cost: float


def choose_options(items: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """The index of every item's chosen option; `ValueError` if not even the smallest options fit.

    The cost is above the least possible one by less than the largest saving of a single step along a hull.
    """
    hulls = [_hull(options) for options in items]
    spent = sum(options[hull[0]].size for options, hull in zip(items, hulls, strict=True))
    if spent > budget:
        raise ValueError(f"the smallest options take {spent}, which is more than the budget of {budget}")
    places = [0] * len(items)
    steps = [_step(items[k], hulls[k], 0, k) for k in range(len(items)) if len(hulls[k]) > 1]
    heapq.heapify(steps)
    while steps:
        _, k, more = heapq.heappop(steps)
        if spent + more > budget:
            continue
        spent += more
        places[k] += 1
        if places[k] + 1 < len(hulls[k]):
            heapq.heappush(steps, _step(items[k], hulls[k], places[k], k))
    return [hull[place] for hull, place in zip(hulls, places, strict=True)]


def _hull(options: Sequence[Option]) -> list[int]:
    """Indices of the options on the lower convex hull, from the smallest to the cheapest."""
    if not options:
        raise ValueError("an item has no options; leave it out")
    hull: list[int] = []
    for index in sorted(range(len(options)), key=lambda index: (options[index].size, options[index].cost)):
        if hull and options[index].cost >= options[hull[-1]].cost:
            continue
        while len(hull) > 1 and _saving(options, hull[-2], hull[-1]) <= _saving(options, hull[-2], index):
            hull.pop()
        hull.append(index)
    return hull


def _saving(options: Sequence[Option], small: int, large: int) -> float:
    """Cost that is saved for each unit of size."""
    return (options[small].cost - options[large].cost) / (options[large].size - options[small].size)


def _step(options: Sequence[Option], hull: Sequence[int], place: int, item: int) -> tuple[float, int, int]:
    """The next step along a hull, best first: (- saving, item, more size)."""
    small, large = hull[place], hull[place + 1]
    return -_saving(options, small, large), item, options[large].size - options[small].size
