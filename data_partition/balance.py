"""How evenly a partition divides the samples."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """The sizes of the clusters; also written as `balance.json`."""

    counts: tuple[int, ...]
    holdout_counts: tuple[int, ...]
    holdout_looks: tuple[int, ...]
    """Held-out samples of each cluster by their looks alone, as generated images are counted; the same as
    `holdout_counts` where the features decide."""
    shares: tuple[float, ...]
    """Of the training samples."""
    smallest_over_mean: float
    largest_over_mean: float
    """Both are 1 for a perfect balance."""
    evenness: float
    """Entropy of the shares over that of equal shares, from 0 to 1."""
    num_fine: int
    distortion: float
    """Mean squared distance of a sample's fine centroid from the mean of its cluster."""
    class_names: tuple[str, ...]
    class_counts: tuple[tuple[int, ...], ...]
    """For each class, its training samples in each cluster."""


def evenness(counts: Int64[np.ndarray, " cluster"]) -> float:
    """Entropy of the shares over its maximum; 1 for a single cluster."""
    shares = counts[counts > 0] / counts.sum()
    return 1.0 if len(counts) == 1 else float(-(shares * np.log(shares)).sum() / np.log(len(counts)))
