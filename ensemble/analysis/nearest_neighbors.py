"""The nearest training image of every query, in one pass over the training shards.

Memory grows with the queries, not with the training set.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int64, UInt8

from data_partition.clustering.kmeans import nearest
from data_partition.shards.shards import Sample, decode_sample, read_batches, read_encoded

CHUNK = 2048
"""Training images that are compared with all queries at once."""
BATCH_IMAGES = 256
"""Images whose features are computed at once."""

Images = UInt8[np.ndarray, "image height width channel"]
Features = Float[np.ndarray, "image feature"]
KnownFeatures = Float[np.ndarray, "known feature"]
Space = Callable[[Images], Features]
"""Images to feature vectors, between which distances are taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NearestNeighbors:
    """Of every query."""

    distances: Float[np.ndarray, " query"]
    """Euclidean, to its nearest training image."""
    rows: Int64[np.ndarray, " query"]
    """The place of that image in the training shards."""


def find_nearest(
    queries: Images, spaces: Mapping[str, Space], shards: Path, on_progress: Callable[[int], None]
) -> dict[str, NearestNeighbors]:
    """The nearest image of the shards, in every space; `on_progress` hears how many images were compared."""
    sought = {name: features_of(space, queries) for name, space in spaces.items()}
    found: dict[str, NearestNeighbors] = {}
    start = 0
    for batch in read_batches(shards, CHUNK):
        for name, space in spaces.items():
            here = _nearest_among(sought[name], features_of(space, batch.images), start)
            found[name] = _nearer(found[name], here) if name in found else here
        start += len(batch.images)
        on_progress(start)
    return found


def features_of(space: Space, images: Images) -> Features:
    """Features of any number of images, in batches."""
    starts = range(0, len(images), BATCH_IMAGES)
    return np.concatenate([space(images[start : start + BATCH_IMAGES]) for start in starts])


def read_rows(shards: Path, rows: Int64[np.ndarray, " wanted"]) -> list[Sample]:
    """The samples at these places of the shards, in this order; all others stay encoded."""
    wanted = set(rows.tolist())
    found = {
        row: decode_sample(encoded, str(shards)) for row, encoded in enumerate(read_encoded(shards)) if row in wanted
    }
    return [found[row] for row in rows.tolist()]


def _nearest_among(sought: Features, known: KnownFeatures, first_row: int) -> NearestNeighbors:
    """Among these features; the distance is that of the two vectors themselves, so a copy's is exactly zero."""
    ids = nearest(sought, known)
    return NearestNeighbors(distances=np.linalg.norm(sought - known[ids], axis=1), rows=ids + first_row)


def _nearer(one: NearestNeighbors, other: NearestNeighbors) -> NearestNeighbors:
    is_nearer = other.distances < one.distances
    return NearestNeighbors(
        distances=np.where(is_nearer, other.distances, one.distances),
        rows=np.where(is_nearer, other.rows, one.rows),
    )
