"""The one criterion for memorization: are more samples near a training image than held-out images are?

The scores apply it to all samples of a row, the audit also to the samples of each expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.special import betaincinv, betaln

CONFIDENCE = 0.95

Distances = Float[np.ndarray, " image"]
OtherDistances = Float[np.ndarray, " other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NearNeighborRate:
    """Rate of samples that are nearer to the training set than almost all held-out images."""

    quantile: float
    """The requested share of held-out images."""
    expected: float
    """Expected share without memorization: the quantile that this number of held-out images resolves."""
    threshold: float
    """Distance below which a sample is near."""
    share: float
    low: float
    """Lower end of the 95 % interval of `share` (Clopper and Pearson 1934, doi:10.1093/biomet/26.4.404)."""
    high: float
    usual: float
    """97.5 % quantile of `share` without memorization, with the randomness of the threshold included."""
    p_value: float
    """Probability of this many near samples, or more, without memorization."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorizationTest:
    """Comparison of samples with held-out images."""

    samples: int
    held_out: int
    ratio: float | None
    """Mean distance to the nearest training image over that of held-out images; None if either has no images."""
    shares: tuple[NearNeighborRate, ...]
    """By quantile; empty without samples or held-out images."""


def compare_distances(samples: Distances, held_out: OtherDistances, quantiles: Sequence[float]) -> MemorizationTest:
    """Compare the distances of samples to the training set with those of held-out images."""
    sizes = len(samples), len(held_out)
    mean = float(held_out.mean()) if all(sizes) else 0.0
    return MemorizationTest(
        samples=sizes[0],
        held_out=sizes[1],
        ratio=float(samples.mean()) / mean if mean > 0 else None,
        shares=tuple(near_neighbor_rate(samples, held_out, quantile) for quantile in quantiles) if all(sizes) else (),
    )


def near_neighbor_rate(samples: Distances, held_out: OtherDistances, quantile: float) -> NearNeighborRate:
    """Return the share of `samples` below the quantile of the held-out images, with its significance."""
    count, num_held_out = len(samples), len(held_out)
    rank = min(max(1, round(quantile * (num_held_out + 1))), num_held_out)
    threshold = float(np.partition(held_out, rank - 1)[rank - 1])
    nearer = int((samples < threshold).sum())
    tail = (1 - CONFIDENCE) / 2
    chances = near_count_chances(count, rank, num_held_out)
    return NearNeighborRate(
        quantile=quantile,
        expected=rank / (num_held_out + 1),
        threshold=threshold,
        share=nearer / count,
        low=float(betaincinv(nearer, count - nearer + 1, tail)) if nearer else 0.0,
        high=float(betaincinv(nearer + 1, count - nearer, 1 - tail)) if nearer < count else 1.0,
        usual=float(np.searchsorted(chances.cumsum(), 1 - tail)) / count,
        p_value=float(chances[nearer:].sum()),
    )


def near_count_chances(count: int, rank: int, num_held_out: int) -> Float[np.ndarray, " near"]:
    """Return the probability of each number of near samples, 0 to `count`, without memorization: beta-binomial.

    The threshold is the held-out distance of this rank. `scipy.stats` has it, and takes a third of a second to import.
    """
    near = np.arange(count + 1)
    ways = -betaln(near + 1, count - near + 1) - np.log(count + 1)
    above = num_held_out + 1 - rank
    chances: Float[np.ndarray, " near"] = np.exp(ways + betaln(near + rank, count - near + above) - betaln(rank, above))
    return chances
