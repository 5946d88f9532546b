"""Adaptive caching: choose the best n steps at which to compute a module, and reuse its output at the others.

    max over 0 = s_1 < ... < s_n of sum_t M[s(t), t],    s(t) the last of them up to t,
    M[a, t] the mean cosine similarity of the module's outputs at steps a and t

Block-wise adaptive caching, 2025, arXiv:2506.13456: dynamic programming over the steps, for each module. Errors
accumulate in cached modules behind computed ones. So whenever a module with one of the largest changes is computed, the
feed-forward layers behind it are computed too (the bubbling union). A U-Net's residual layers stand for them, at level
`block` the blocks themselves, at level `unit` the linear layers and convolutions in them.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

Similarity = Float[np.ndarray, "step step"]
Outputs = Float[Tensor, "step row feature"]


def cosine_similarity(outputs: Outputs) -> Similarity:
    """Return M, the mean over the rows."""
    unit = functional.normalize(outputs.double(), dim=-1)
    matrix: Similarity = torch.einsum("arf,brf->ab", unit, unit).div(outputs.shape[1]).numpy()
    return matrix


def output_variation(outputs: Outputs) -> float:
    """Return the mean absolute difference between outputs of any two steps, relative to their mean magnitude."""
    flat = outputs.double().flatten(1)
    pairs = torch.pdist(flat, p=1).mean() / flat.shape[1]
    return float(pairs / flat.abs().mean())


def optimal_compute_steps(similarity: Similarity, count: int) -> tuple[int, ...]:
    """Return the `count` steps of the equation above; raise `ValueError` unless 1 <= count <= number of steps."""
    steps = len(similarity)
    if not 1 <= count <= steps:
        raise ValueError(f"of {steps} steps, 1 to {steps} can be computed; got {count}")
    sums = np.concatenate([np.zeros((steps, 1)), np.cumsum(similarity, axis=1)], axis=1)
    best = np.full((count + 1, steps + 1), -np.inf)
    chosen = np.zeros((count + 1, steps + 1), int)
    best[0, 0] = 0.0
    for number in range(1, count + 1):
        for end in range(number, steps + 1):
            starts = np.arange(number - 1, end)
            values = best[number - 1, starts] + sums[starts, end] - sums[starts, starts]
            index = int(values.argmax())
            best[number, end], chosen[number, end] = values[index], starts[index]
    compute_steps, end = [], steps
    for number in range(count, 0, -1):
        end = int(chosen[number, end])
        compute_steps.append(end)
    return tuple(reversed(compute_steps))


def bubbling_union(
    compute_steps: Mapping[str, tuple[int, ...]],
    changes: Mapping[str, float],
    count: int,
    feed_forward: Sequence[str],
) -> dict[str, tuple[int, ...]]:
    """Return the steps after the union for the `count` modules of the largest changes, all in network order."""
    order = list(compute_steps)
    union = {path: set(steps) for path, steps in compute_steps.items()}
    for path in sorted(order, key=lambda path: -changes[path])[:count]:
        for other in feed_forward:
            if order.index(other) >= order.index(path):
                union[other] |= set(compute_steps[path])
    return {path: tuple(sorted(steps)) for path, steps in union.items()}
