"""Distances between two sets of feature vectors: pure functions of arrays, in float64.

frechet_distance         two Gaussians                     biased upwards when samples are few: needs a floor
kernel_distance          MMD with a cubic kernel           unbiased, may be a little below zero
precision, recall        `share_covered` by a manifold     quality and variety, measured apart
vendi_score              entropy of a similarity matrix    number of dissimilar samples; no reference needed
total_variation          shares of classes or clusters     0 equal, 1 disjoint
nearest_neighbour_ratio  distances to the training set     near 1 no copying, well below 1 memorization
"""

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
from jaxtyping import Float

BLOCK_ROWS = 1024
"""Rows of a distance or kernel matrix that are held in memory at once."""

Features: TypeAlias = Float[np.ndarray, "sample feature"]
OtherFeatures: TypeAlias = Float[np.ndarray, "other feature"]


def frechet_distance(first: Features, second: OtherFeatures) -> float:
    """Compute the Fréchet distance of Gaussians fitted to two sets (Heusel et al. 2017, arXiv:1706.08500, eq. 6)."""
    moments = [
        (rows.mean(0, dtype=np.float64), np.cov(rows, rowvar=False, dtype=np.float64)) for rows in (first, second)
    ]
    (first_mean, first_covariance), (second_mean, second_covariance) = moments
    return gaussian_frechet_distance(
        first_mean, np.atleast_2d(first_covariance), second_mean, np.atleast_2d(second_covariance)
    )


def gaussian_frechet_distance(
    first_mean: Float[np.ndarray, " feature"],
    first_covariance: Float[np.ndarray, "feature feature"],
    second_mean: Float[np.ndarray, " feature"],
    second_covariance: Float[np.ndarray, "feature feature"],
) -> float:
    """Compute the squared 2-Wasserstein distance of two Gaussians; singular covariances are fine.

    |m - n|^2 + tr(S + T - 2 (S^1/2 T S^1/2)^1/2)   (Dowson and Landau 1982, doi:10.1016/0047-259X(82)90077-X)
    """
    variances, axes = np.linalg.eigh(first_covariance)
    root = (axes * np.sqrt(variances.clip(min=0))) @ axes.T
    overlap = np.sqrt(np.linalg.eigvalsh(root @ second_covariance @ root).clip(min=0)).sum()
    spread = np.trace(first_covariance) + np.trace(second_covariance) - 2 * overlap
    return float(np.square(first_mean - second_mean).sum() + max(spread, 0.0))


def kernel_distance(first: Features, second: OtherFeatures) -> float:
    """Compute KID, the unbiased squared MMD of the kernel (x.y / d + 1)^3 (Bińkowski et al. 2018, arXiv:1801.01401)."""
    return kernel_within(first) + kernel_within(second) - 2 * kernel_between(first, second)


def kernel_within(features: Features) -> float:
    """Return the mean of the cubic kernel over all pairs of different rows."""
    count = len(features)
    if count < 2:
        raise ValueError(f"the kernel distance needs two rows in each set, not {count}; generate more samples")
    diagonal = np.power(np.square(features.astype(np.float64)).mean(1) + 1, 3).sum()
    return float((kernel_between(features, features) * count**2 - diagonal) / (count * (count - 1)))


def kernel_between(first: Features, second: OtherFeatures) -> float:
    """Return the mean of the cubic kernel over all pairs of a row of `first` and a row of `second`."""
    other = second.astype(np.float64).T / first.shape[1]
    total = sum(float(np.power(block @ other + 1, 3).sum()) for block in row_blocks(first))
    return total / (len(first) * len(second))


def kernel_distance_error(first: Features, second: OtherFeatures, blocks: int = 10) -> float:
    """Estimate the standard error of the kernel distance from its spread over disjoint blocks of both sets.

    Near a distance of zero small blocks scatter more than large ones, so the estimate is too large there.
    """
    pairs = zip(np.array_split(first, blocks), np.array_split(second, blocks), strict=True)
    return float(
        np.std([kernel_distance(block, other_block) for block, other_block in pairs], ddof=1) / np.sqrt(blocks)
    )


def neighbor_radii(features: Features, neighbours: int) -> Float[np.ndarray, " sample"]:
    """Return the squared distance of every row to its k-th nearest other row."""
    if len(features) <= neighbours:
        raise ValueError(
            f"{neighbours} neighbours need more than {neighbours} rows, not {len(features)}; "
            "generate more samples or lower `neighbours`"
        )
    blocks = squared_distances(features, features)
    return np.concatenate([np.partition(block, neighbours, axis=1)[:, neighbours] for block in blocks])


def share_covered(queries: Features, manifold: OtherFeatures, radii: Float[np.ndarray, " other"]) -> float:
    """Return the share of `queries` inside the union of balls around `manifold`; `radii` are squared.

    Precision is samples inside the real manifold, recall is real rows inside that of the samples
    (Kynkäänniemi et al. 2019, arXiv:1904.06991, eq. 2).
    """
    return float(np.concatenate([(block <= radii).any(1) for block in squared_distances(queries, manifold)]).mean())


def vendi_score(features: Features) -> float:
    """Compute the effective number of dissimilar samples: 1 if all are equal, n if all are orthogonal.

    exp(-sum_i l_i log l_i), l the eigenvalues of the matrix of cosines over n (Friedman and Dieng 2023,
    arXiv:2210.02410, definition 3.1); those of the n x n and of the d x d matrix are equal up to zeros.
    """
    rows = features.astype(np.float64)
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    gram = unit @ unit.T if len(unit) <= unit.shape[1] else unit.T @ unit
    values = np.linalg.eigvalsh(gram / len(unit))
    positive = values[values > 1e-12]
    return float(np.exp(-(positive * np.log(positive)).sum()))


def total_variation(first: Float[np.ndarray, " group"], second: Float[np.ndarray, " group"]) -> float:
    """Return half the summed difference of two sets of counts, each scaled to sum to one: 0 equal, 1 disjoint."""
    return float(np.abs(shares(first) - shares(second)).sum() / 2)


def total_variation_floor(counts: Float[np.ndarray, " group"], num_samples: int) -> float:
    """Return the expected total variation of `counts` and `num_samples` fair draws of its shares (normal limit)."""
    share = shares(counts)
    variance = share * (1 - share) * (1 / counts.sum() + 1 / num_samples)
    return float(np.sqrt(2 / np.pi * variance).sum() / 2)


def coverage(first: Float[np.ndarray, " group"], real: Float[np.ndarray, " group"]) -> float:
    """Return the share of the groups present in `real` that reach at least half of their real share in `first`."""
    present = real > 0
    return float((2 * shares(first) >= shares(real))[present].mean())


def shares(counts: Float[np.ndarray, " group"]) -> Float[np.ndarray, " group"]:
    """Divide `counts` by their sum, which must be positive."""
    if counts.min() < 0 or counts.sum() <= 0:
        raise ValueError(
            f"shares need counts of at least 0 that are not all 0, not {counts.tolist()}; pass counts of samples"
        )
    return counts / float(counts.sum())


def nearest_neighbor_ratio(samples: Features, training: OtherFeatures, real_distance: float) -> float:
    """Return the mean distance of a sample to its nearest training row, in units of `real_distance`.

    `real_distance` is the same mean for held-out rows: see `mean_nearest_distance`.
    """
    if real_distance <= 0:
        raise ValueError(
            "copying is measured against held-out rows, and every held-out row is also a training row; "
            "remove the duplicates from the data set"
        )
    return mean_nearest_distance(samples, training) / real_distance


def mean_nearest_distance(queries: Features, training: OtherFeatures) -> float:
    """Return the mean Euclidean distance of a query to its nearest training row."""
    return float(np.sqrt(np.concatenate([block.min(1) for block in squared_distances(queries, training)])).mean())


def squared_distances(first: Features, second: OtherFeatures) -> Iterator[Float[np.ndarray, "block other"]]:
    """Yield squared Euclidean distances for blocks of rows of `first`; rounding errors of a zero distance become 0."""
    other = second.astype(np.float64)
    other_norms = np.square(other).sum(1)
    for block in row_blocks(first):
        norms = np.square(block).sum(1)[:, None] + other_norms
        distances = norms - 2 * block @ other.T
        yield np.where(distances > 1e-12 * norms, distances, 0.0)


def row_blocks(features: Features) -> Iterator[Float[np.ndarray, "block feature"]]:
    """Yield `features` in float64, `BLOCK_ROWS` rows at a time."""
    for start in range(0, len(features), BLOCK_ROWS):
        yield features[start : start + BLOCK_ROWS].astype(np.float64)
