"""At which steps a module is best computed, if it may be computed at few: adaptive caching.

    max over 0 = s_1 < ... < s_n of sum_t M[s(t), t],    s(t) the last of them up to t,
    M[a, t] the mean cosine of what the module says at steps a and t

Block-wise adaptive caching, 2025, arXiv:2506.13456: a dynamic programme over the steps for each module. Modules
that are kept while those before them are computed add up errors; so whenever one of those that change most is computed,
the feed-forward layers behind it are too (the bubbling union).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

Similarity = Float[np.ndarray, "step step"]
Outputs = Float[Tensor, "step row feature"]


def similarity(said: Outputs) -> Similarity:
    """M, by the mean over the rows."""
    unit = functional.normalize(said.double(), dim=-1)
    found: Similarity = torch.einsum("arf,brf->ab", unit, unit).div(said.shape[1]).numpy()
    return found


def output_variation(said: Outputs) -> float:
    """Mean absolute difference between what a module says at any two steps, over its mean size."""
    flat = said.double().flatten(1)
    pairs = torch.pdist(flat, p=1).mean() / flat.shape[1]
    return float(pairs / flat.abs().mean())


def optimal_compute_steps(found: Similarity, count: int) -> tuple[int, ...]:
    """The `count` steps of the equation above; `ValueError` if there are fewer steps than that, or none is allowed."""
    steps = len(found)
    if not 1 <= count <= steps:
        raise ValueError(f"of {steps} steps, 1 to {steps} can be computed; got {count}")
    sums = np.concatenate([np.zeros((steps, 1)), np.cumsum(found, axis=1)], axis=1)
    best = np.full((count + 1, steps + 1), -np.inf)
    chosen = np.zeros((count + 1, steps + 1), int)
    best[0, 0] = 0.0
    for number in range(1, count + 1):
        for end in range(number, steps + 1):
            starts = np.arange(number - 1, end)
            values = best[number - 1, starts] + sums[starts, end] - sums[starts, starts]
            place = int(values.argmax())
            best[number, end], chosen[number, end] = values[place], starts[place]
    found_steps, end = [], steps
    for number in range(count, 0, -1):
        end = int(chosen[number, end])
        found_steps.append(end)
    return tuple(reversed(found_steps))


def bubbling_union(
    updates: Mapping[str, tuple[int, ...]], changes: Mapping[str, float], most: int, behind: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    """The schedules after the union; `behind` are the feed-forward layers, in the network's order, as `updates` is."""
    order = list(updates)
    union = {path: set(steps) for path, steps in updates.items()}
    for path in sorted(order, key=lambda path: -changes[path])[:most]:
        for other in behind:
            if order.index(other) >= order.index(path):
                union[other] |= set(updates[path])
    return {path: tuple(sorted(steps)) for path, steps in union.items()}
