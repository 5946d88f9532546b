"""Find the nearest training image of every query, in one pass over the training shards.

Memory grows with the queries, not with the training set.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int64, UInt8

from data_partition.clustering.kmeans import assign_nearest
from data_partition.shards.images import crop_to
from data_partition.shards.shards import Sample, decode_sample, read_batches, read_encoded, read_index

CHUNK = 2048
"""Training images per comparison with all queries."""
BATCH_IMAGES = 256
"""Images per batch of feature extraction."""

Images = UInt8[np.ndarray, "image height width channel"]
Features = Float[np.ndarray, "image feature"]
TrainingFeatures = Float[np.ndarray, "training feature"]
Space = Callable[[Images], Features]
"""Map from images to the feature vectors whose distances are measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NearestNeighbors:
    """Nearest training image of every query."""

    distances: Float[np.ndarray, " query"]
    """Euclidean distance to it."""
    rows: Int64[np.ndarray, " query"]
    """Its position in the training shards."""


def find_nearest(
    queries: Images, spaces: Mapping[str, Space], shards: Path, on_progress: Callable[[int], None]
) -> dict[str, NearestNeighbors]:
    """Find the nearest image of the shards in every space; `on_progress` receives the number of compared images."""
    query_features = {name: extract_features(space, queries) for name, space in spaces.items()}
    neighbors: dict[str, NearestNeighbors] = {}
    start = 0
    for batch in read_batches(shards, CHUNK):
        for name, space in spaces.items():
            candidates = _find_in_chunk(query_features[name], extract_features(space, batch.images), start)
            neighbors[name] = _nearer(neighbors[name], candidates) if name in neighbors else candidates
        start += len(batch.images)
        on_progress(start)
    return neighbors


def nearest_distances(
    queries: Features, training: UInt8[np.ndarray, "training feature"]
) -> Float[np.ndarray, " query"]:
    """Return the Euclidean distance of every row of pixels in [0, 1] to the nearest row of pixels in 0 … 255."""
    distances = np.full(len(queries), np.inf, np.float32)
    for start in range(0, len(training), CHUNK):
        chunk = training[start : start + CHUNK].astype(np.float32) / np.float32(255)
        distances = np.minimum(distances, _find_in_chunk(queries, chunk, start).distances)
    return distances


def extract_features(space: Space, images: Images) -> Features:
    """Extract the features of any number of images, in batches."""
    starts = range(0, len(images), BATCH_IMAGES)
    return np.concatenate([space(images[start : start + BATCH_IMAGES]) for start in starts])


def read_rows(shards: Path, rows: Int64[np.ndarray, " wanted"]) -> list[Sample]:
    """Read the samples at these positions of the shards, in this order; decode no others."""
    wanted = set(rows.tolist())
    samples, (height, width, _) = {}, read_index(shards).image_shape
    for row, encoded in enumerate(read_encoded(shards)):
        if row in wanted:
            sample = decode_sample(encoded, str(shards))
            samples[row] = replace(sample, image=crop_to(sample.image, height, width))
    return [samples[row] for row in rows.tolist()]


def _find_in_chunk(queries: Features, training: TrainingFeatures, first_row: int) -> NearestNeighbors:
    """Find the nearest of these features; distances come from differences, so that of a copy is exactly zero."""
    ids = assign_nearest(queries, training)
    return NearestNeighbors(distances=np.linalg.norm(queries - training[ids], axis=1), rows=ids + first_row)


def _nearer(first: NearestNeighbors, second: NearestNeighbors) -> NearestNeighbors:
    is_nearer = second.distances < first.distances
    return NearestNeighbors(
        distances=np.where(is_nearer, second.distances, first.distances),
        rows=np.where(is_nearer, second.rows, first.rows),
    )
