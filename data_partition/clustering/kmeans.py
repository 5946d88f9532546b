"""k-means on features: many fine centroids, and which of them is nearest. Pure, seeded, no files."""

import faiss
import numpy as np
from jaxtyping import Float, Float32, Int64

from data_partition.errors import TooFewSamples

POINTS_PER_CENTROID = 64
"""Fine centroids are found on at most so many samples each, so that memory does not grow with the data."""

BLOCK_ROWS = 4096


def num_fine(most: int, samples: int, num_experts: int) -> int:
    """How many fine centroids: at most `most` and a twentieth of the samples, at least one for each expert."""
    if samples < num_experts:
        raise TooFewSamples(
            f"{samples} training samples cannot be divided among {num_experts} experts; "
            "set a smaller partition.num_experts or add images"
        )
    return max(min(most, samples // 20), num_experts)


def training_rows(samples: int, count: int, seed: int) -> Int64[np.ndarray, " row"]:
    """Which samples `count` centroids are found on, in ascending order: all of them, or a random choice."""
    wanted = POINTS_PER_CENTROID * count
    if samples <= wanted:
        return np.arange(samples, dtype=np.int64)
    return np.sort(np.random.default_rng(seed).choice(samples, wanted, replace=False, shuffle=False))


def fine_centroids(
    features: Float32[np.ndarray, "sample feature"], count: int, iterations: int, seed: int
) -> Float32[np.ndarray, "fine feature"]:
    """`count` centroids of at most `POINTS_PER_CENTROID * count` rows of `features`, which may be memory-mapped.

    The same features, seed and machine give the same bytes: faiss runs on one thread here.
    """
    rows = np.ascontiguousarray(features[training_rows(len(features), count, seed)])
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


def nearest(
    features: Float[np.ndarray, "sample feature"], centroids: Float[np.ndarray, "fine feature"]
) -> Int64[np.ndarray, " sample"]:
    """The index of the centroid at the least Euclidean distance from each row, in blocks of `BLOCK_ROWS`."""
    half_squares = 0.5 * np.square(centroids).sum(axis=1)
    ids = np.empty(len(features), dtype=np.int64)
    for start in range(0, len(features), BLOCK_ROWS):
        block = features[start : start + BLOCK_ROWS]
        ids[start : start + BLOCK_ROWS] = (half_squares - block @ centroids.T).argmin(axis=1)
    return ids
