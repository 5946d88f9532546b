"""Are samples nearer to the training set than real images that were not trained on? Pure functions of distances.

The r-th smallest of H held-out distances is the threshold. If samples are as far from the training set as held-out
images are, the number of n samples below it is beta-binomial (n, r, H + 1 - r), whatever the distances look like; so
r / (H + 1) of them are expected there, and an excess is memorising.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.stats import betabinom, binomtest

CONFIDENCE = 0.95

Distances = Float[np.ndarray, " image"]
OtherDistances = Float[np.ndarray, " other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NearShare:
    """The samples that are nearer to the training set than nearly all held-out images."""

    quantile: float
    """The share of held-out images that was asked for."""
    expected: float
    """What a generator without memory is expected to show; the nearest that so many held-out images can tell."""
    threshold: float
    """Distance below which a sample counts."""
    share: float
    low: float
    """Lower end of the 95 % interval of `share` (Clopper and Pearson 1934, doi:10.1093/biomet/26.4.404)."""
    high: float
    usual: float
    """Without memorising, `share` is at most this in 97.5 % of all cases, the chance of the threshold included."""
    p_value: float
    """How probable so many near samples, or more, are without memorising."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Nearness:
    """A set of samples beside the held-out images that it is measured by."""

    samples: int
    held_out: int
    ratio: float | None
    """Mean distance to the nearest training image over that of held-out images; None if either is without images."""
    shares: tuple[NearShare, ...]
    """By quantile; empty if there are no samples, or no held-out images."""


def compare_nearness(samples: Distances, held_out: OtherDistances, quantiles: Sequence[float]) -> Nearness:
    """Distances of samples to the training set beside those of held-out images."""
    sizes = len(samples), len(held_out)
    mean = float(held_out.mean()) if all(sizes) else 0.0
    return Nearness(
        samples=sizes[0],
        held_out=sizes[1],
        ratio=float(samples.mean()) / mean if mean > 0 else None,
        shares=tuple(near_share(samples, held_out, quantile) for quantile in quantiles) if all(sizes) else (),
    )


def near_share(samples: Distances, held_out: OtherDistances, quantile: float) -> NearShare:
    """The share of `samples` below the held-out images' quantile."""
    count, known = len(samples), len(held_out)
    rank = min(max(1, round(quantile * (known + 1))), known)
    threshold = float(np.partition(held_out, rank - 1)[rank - 1])
    nearer = int((samples < threshold).sum())
    interval = binomtest(nearer, count).proportion_ci(CONFIDENCE)
    fresh = betabinom(count, rank, known + 1 - rank)
    return NearShare(
        quantile=quantile,
        expected=rank / (known + 1),
        threshold=threshold,
        share=nearer / count,
        low=float(interval.low),
        high=float(interval.high),
        usual=float(fresh.ppf((1 + CONFIDENCE) / 2)) / count,
        p_value=float(fresh.sf(nearer - 1)),
    )
