"""Distances between two sets of feature vectors: pure functions of arrays, in float64.

frechet_distance         two Gaussians                     biased upwards when samples are few: needs a floor
kernel_distance          MMD with a cubic kernel           unbiased, may be a little below zero
precision, recall        `share_covered` by a manifold     quality and variety, measured apart
vendi_score              entropy of a similarity matrix    number of dissimilar samples; no reference needed
total_variation          shares of classes or clusters     0 equal, 1 disjoint
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
    """Compute the Fréchet distance of Gaussians fitted to two sets (Heusel et al. 2017, arXiv:1706.08500, eq. 6).

    Where features outnumber rows, the overlap is the sum of the singular values of A B^T, for rows A and B that are
    centered and divided by the square root of their number minus one: tr (S^1/2 T S^1/2)^1/2 = |A B^T|_* if S = A^T A
    and T = B^T B. Memory then grows with the rows, not with the square of the features.
    """
    means = [rows.mean(0, dtype=np.float64) for rows in (first, second)]
    if first.shape[1] <= min(len(first), len(second)):
        covariances = [np.atleast_2d(np.cov(rows, rowvar=False, dtype=np.float64)) for rows in (first, second)]
        return gaussian_frechet_distance(means[0], covariances[0], means[1], covariances[1])
    centered = [(rows - mean) / np.sqrt(len(rows) - 1) for rows, mean in zip((first, second), means, strict=True)]
    overlap = np.linalg.svd(centered[0] @ centered[1].T, compute_uv=False).sum()
    spread = sum(float(np.square(rows).sum()) for rows in centered) - 2 * overlap
    return float(np.square(means[0] - means[1]).sum() + max(spread, 0.0))


def frechet_distance_error(first: Features, second: OtherFeatures, blocks: int = 10) -> float:
    """Estimate the standard error of the Fréchet distance over draws of `first`, by a jackknife that omits a block.

    All rows of a table share `second`, so its randomness cancels in their differences.
    """
    omitted = np.array_split(np.arange(len(first)), blocks)
    distances = [frechet_distance(np.delete(first, rows, axis=0), second) for rows in omitted]
    return float(np.sqrt((blocks - 1) * np.var(distances)))


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


def kernel_distance(first: Features, second: OtherFeatures) -> tuple[float, float]:
    """Compute KID and its standard error, the latter from how much each row contributes.

    KID is the unbiased squared MMD of the kernel (x.y / d + 1)^3 (Bińkowski et al. 2018, arXiv:1801.01401). A row
    contributes twice the difference of its mean kernels to the rows of its own set and of the other one (first-order
    term of a U-statistic: Hoeffding 1948, doi:10.1214/aoms/1177730196).
    """
    differences = [
        _kernel_means_within(rows) - _kernel_means(rows, others) for rows, others in ((first, second), (second, first))
    ]
    error = np.sqrt(sum(4 * np.var(values, ddof=1) / len(values) for values in differences))
    return float(sum(values.mean() for values in differences)), float(error)


def _kernel_means_within(features: Features) -> Float[np.ndarray, " sample"]:
    """Return every row's mean kernel to all others."""
    count = len(features)
    if count < 2:
        raise ValueError(f"the kernel distance needs two rows in each set, not {count}; generate more samples")
    own = np.power(np.square(features.astype(np.float64)).mean(1) + 1, 3)
    means: Float[np.ndarray, " sample"] = (_kernel_means(features, features) * count - own) / (count - 1)
    return means


def _kernel_means(first: Features, second: OtherFeatures) -> Float[np.ndarray, " sample"]:
    """Return the mean kernel of every row of `first` to the rows of `second`."""
    other = second.astype(np.float64).T / first.shape[1]
    return np.concatenate([np.power(block @ other + 1, 3).mean(1) for block in row_blocks(first)])


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
