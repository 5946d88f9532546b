"""k-means on features: fine centroids, and the nearest one of each sample. Pure, seeded, no files."""

import faiss
import numpy as np
from jaxtyping import Float, Float32, Int64

from data_partition.errors import TooFewSamples

POINTS_PER_CENTROID = 64
"""Maximum number of training samples per fine centroid, so that memory does not grow with the data."""

BLOCK_ROWS = 4096


def choose_num_fine(limit: int, samples: int, num_experts: int) -> int:
    """Return the number of fine centroids: at most `limit` and a twentieth of the samples, at least one per expert."""
    if samples < num_experts:
        raise TooFewSamples(
            f"{samples} training samples cannot be divided among {num_experts} experts; "
            "set a smaller partition.num_experts or add images"
        )
    return max(min(limit, samples // 20), num_experts)


def choose_training_rows(samples: int, count: int, seed: int) -> Int64[np.ndarray, " row"]:
    """Return the samples that `count` centroids are fitted on, in ascending order: all, or a random subset."""
    size = POINTS_PER_CENTROID * count
    if samples <= size:
        return np.arange(samples, dtype=np.int64)
    return np.sort(np.random.default_rng(seed).choice(samples, size, replace=False, shuffle=False))


def fit_fine_centroids(
    features: Float32[np.ndarray, "sample feature"], count: int, iterations: int, seed: int
) -> Float32[np.ndarray, "fine feature"]:
    """Fit `count` centroids to at most `POINTS_PER_CENTROID * count` rows of `features`, which may be memory-mapped.

    The same features, seed and machine give the same bytes: faiss runs on one thread here.
    """
    rows = np.ascontiguousarray(features[choose_training_rows(len(features), count, seed)])
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        kmeans = faiss.Kmeans(
            rows.shape[1],
            count,
            niter=iterations,
            seed=seed % 2**31,
            min_points_per_centroid=1,
            max_points_per_centroid=POINTS_PER_CENTROID,
        )
        kmeans.train(rows)
    finally:
        faiss.omp_set_num_threads(threads)
    return np.array(kmeans.centroids, dtype=np.float32)


def assign_nearest(
    features: Float[np.ndarray, "sample feature"], centroids: Float[np.ndarray, "fine feature"]
) -> Int64[np.ndarray, " sample"]:
    """Return the index of each row's nearest centroid (Euclidean), computed in blocks of `BLOCK_ROWS`."""
    half_squares = 0.5 * np.square(centroids).sum(axis=1)
    ids = np.empty(len(features), dtype=np.int64)
    for start in range(0, len(features), BLOCK_ROWS):
        block = features[start : start + BLOCK_ROWS]
        ids[start : start + BLOCK_ROWS] = (half_squares - block @ centroids.T).argmin(axis=1)
    return ids
