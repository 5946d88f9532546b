"""Exact knapsacks, solved as integer programs: which layers to remove, and how many bits each weight gets.

    choose_items:    min sum_i c_i x_i       subject to  sum_i s_i x_i + sum_J s_J y_J >= target,         x_i in {0, 1}
                                                         y_J <= x_i for all i in J,                       y_J in {0, 1}
    choose_options:  min sum_ij c_ij x_ij    subject to  sum_ij s_ij x_ij <= budget,  sum_j x_ij = 1,     x_ij in {0, 1}

The second is the multiple-choice knapsack (Sinha & Zoltners 1979). The solver is HiGHS. It is deterministic, so equal
inputs always give the same choice among ties. scipy.optimize takes half a second to import, so functions import it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

LARGEST_COST = 1e6
"""Costs are scaled to this maximum: HiGHS stops at an absolute gap of 1e-6, which is then 1e-12 of the largest cost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One of the values that an item can take."""

    size: int
    cost: float


def choose_items(
    costs: Sequence[float], sizes: Sequence[int], target: int, joint_sizes: Mapping[frozenset[int], int] | None = None
) -> list[int]:
    """Return the indices whose sizes add up to at least `target` at the least sum of `costs`.

    `joint_sizes` are added to those of single items, each once all items of its set are chosen. Raises `ValueError` if
    all sizes together are smaller than the target.
    """
    joint = joint_sizes or {}
    all_sizes = [*sizes, *joint.values()]
    if sum(all_sizes) < target:
        raise ValueError(f"all items together have size {sum(all_sizes):,}, less than {target:,}; lower the target")
    constraints = [(np.array([all_sizes], float), float(target), np.inf)]
    for column, items in enumerate(joint, start=len(sizes)):
        for item in items:
            row = np.zeros((1, len(all_sizes)))
            row[0, [column, item]] = 1.0, -1.0
            constraints.append((row, -np.inf, 0.0))
    return [column for column in _solve([*costs, *[0.0] * len(joint)], constraints) if column < len(sizes)]


def choose_options(items: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """Return the index of the option of every item, at the least total cost within a budget of total size.

    Raises `ValueError` if an item has no options, or if not even the smallest options fit.
    """
    if not all(items):
        raise ValueError("an item has no options; leave it out")
    smallest = sum(min(option.size for option in options) for options in items)
    if smallest > budget:
        raise ValueError(f"the smallest options take {smallest}, more than the budget of {budget}; raise the budget")
    from scipy import sparse

    flat = [(number, index, option) for number, options in enumerate(items) for index, option in enumerate(options)]
    owners = [number for number, _, _ in flat]
    one_of_each = sparse.csr_array((np.ones(len(flat)), (owners, range(len(flat)))), shape=(len(items), len(flat)))
    sizes = np.array([[option.size for _, _, option in flat]], float)
    chosen = _solve([option.cost for _, _, option in flat], [(one_of_each, 1.0, 1.0), (sizes, -np.inf, float(budget))])
    return [flat[column][1] for column in chosen]


def _solve(costs: Sequence[float], constraints: Sequence[tuple[Any, float, float]]) -> list[int]:
    """Return the columns that are 1 in the cheapest solution; a constraint is (matrix, lowest, highest)."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    values: Float[np.ndarray, " column"] = np.array(costs, float)
    if not len(values):
        return []
    result = milp(
        values / (np.abs(values).max() or 1.0) * LARGEST_COST,
        integrality=np.ones(len(values)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(*constraint) for constraint in constraints],
        options={"mip_rel_gap": 0.0},
    )
    if not result.success:
        raise RuntimeError(f"HiGHS stopped without an optimum: {result.message}; please report the sizes and costs")
    chosen = np.flatnonzero(np.round(result.x))
    for matrix, lowest, highest in constraints:
        totals = matrix[:, chosen].sum(1)
        if np.any(totals < lowest) or np.any(totals > highest):
            raise RuntimeError("HiGHS returned a choice outside its constraints; please report the sizes and costs")
    return [int(column) for column in chosen]
