"""Whether the losses of single layers add up to the loss of all of them together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Additivity:
    """Sums of single losses against joint losses, over random sets of layers."""

    spearman: float
    """Their rank correlation."""
    ratio: float
    """Median of joint over sum."""
    sums: tuple[float, ...]
    joint: tuple[float, ...]
    sizes: tuple[int, ...]
    """Layers of each set."""


def additivity(costs: Sequence[float], joint_cost: Callable[[list[int]], float], sets: int, seed: int) -> Additivity:
    """Over `sets` random sets of two layers up to half of them; `joint_cost` takes their indices."""
    generator = np.random.default_rng(seed)
    sums, joint, sizes = [], [], []
    for _ in range(sets):
        size = int(generator.integers(2, max(3, len(costs) // 2 + 1)))
        chosen = sorted(generator.choice(len(costs), size, replace=False).tolist())
        sums.append(sum(costs[index] for index in chosen))
        joint.append(joint_cost(chosen))
        sizes.append(size)
    first, second = (np.argsort(np.argsort(values)).astype(float) for values in (sums, joint))
    return Additivity(
        spearman=float(np.corrcoef(first, second)[0, 1]),
        ratio=float(np.median(np.array(joint) / np.array(sums))),
        sums=tuple(sums),
        joint=tuple(joint),
        sizes=tuple(sizes),
    )
