"""Which sample goes to which cluster: by how it looks, by its class, or by chance.

features   the cluster of its nearest fine centroid
labels     the cluster of its class; with fewer clusters than classes, those that look alike are together
random     by chance: what clusters are worth is the distance of the others from this one

To add a division, write the function and add it to `DIVISIONS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64, Integer

from data_partition.assignment import store_ids
from data_partition.clustering.balanced_kmeans import merge_centroids
from data_partition.clustering.kmeans import BLOCK_ROWS
from data_partition.config import PartitionConfig
from data_partition.errors import EmptyCluster, MissingLabels
from data_partition.shards.shards import encoded_label, read_encoded, read_index
from ddm_core.random_bits import splitmix64_finalize

FineIds = Integer[np.ndarray, " sample"]
ClusterIds = Int64[np.ndarray, " block"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionInputs:
    """All that a division may look at."""

    config: PartitionConfig
    dataset: Path
    features: Float32[np.ndarray, "sample feature"]
    centroids: Float32[np.ndarray, "fine feature"]
    fine_ids: FineIds
    """Nearest fine centroid of every training sample."""
    fine_counts: Int64[np.ndarray, " fine"]
    scratch: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterAssignment:
    """The cluster of every sample, by its row in the shards."""

    fine_to_cluster: Int64[np.ndarray, " fine"]
    """Where an image belongs that is known by its looks alone: the cluster that most of its neighbours are in."""
    training: Callable[[slice], ClusterIds]
    """Of training samples."""
    holdout: Callable[[slice], ClusterIds] | None = None
    """Of held-out samples; None: by their looks."""


def by_features(seen: PartitionInputs) -> ClusterAssignment:
    """Fine centroids of k-means, put together into clusters."""
    config = seen.config
    ids = merge_centroids(seen.centroids, seen.fine_counts, config.num_experts, config.balanced, config.seed)
    return ClusterAssignment(fine_to_cluster=ids, training=lambda rows: ids[seen.fine_ids[rows]])


def by_labels(seen: PartitionInputs) -> ClusterAssignment:
    """Classes, put together by their mean features; raises `MissingLabels` or `EmptyCluster`."""
    config, classes = seen.config, len(read_index(seen.dataset / "train").class_names)
    labels = {part: _labels(seen, part) for part in ("train", "holdout")}
    if not classes or min(found.min(initial=0) for found in labels.values()) < 0:
        raise MissingLabels(
            "partition.by=labels needs a class for every sample, and some have none; use partition.by=features"
        )
    counts = np.bincount(labels["train"], minlength=classes)
    if np.count_nonzero(counts) < config.num_experts:
        raise EmptyCluster(
            f"{np.count_nonzero(counts)} classes cannot be {config.num_experts} clusters; "
            f"set partition.num_experts to at most {np.count_nonzero(counts)}, or partition.by=features"
        )
    means = np.stack([np.bincount(labels["train"], column, classes) for column in seen.features.T], axis=1)
    means = (means / np.maximum(counts, 1)[:, None]).astype(np.float32)
    cluster_of = merge_centroids(means, counts, config.num_experts, config.balanced, config.seed)

    def training(rows: slice) -> ClusterIds:
        ids: ClusterIds = cluster_of[labels["train"][rows]]
        return ids

    return ClusterAssignment(
        fine_to_cluster=_most_frequent(seen, training),
        training=training,
        holdout=lambda rows: cluster_of[labels["holdout"][rows]],
    )


def by_random(seen: PartitionInputs) -> ClusterAssignment:
    """A hash of seed, part and row: clusters of equal expectation."""

    def drawn(part: int, count: int) -> Callable[[slice], ClusterIds]:
        def ids(rows: slice) -> ClusterIds:
            keys = np.arange(*rows.indices(count), dtype=np.uint64) + np.uint64(part << 40)
            seed = np.uint64(seen.config.seed % 2**32) << np.uint64(48)
            return (splitmix64_finalize(keys ^ seed) % np.uint64(seen.config.num_experts)).astype(np.int64)

        return ids

    counts = [read_index(seen.dataset / part).count for part in ("train", "holdout")]
    training, holdout = drawn(0, counts[0]), drawn(1, counts[1])
    return ClusterAssignment(fine_to_cluster=_most_frequent(seen, training), training=training, holdout=holdout)


STRATEGIES: dict[str, Callable[[PartitionInputs], ClusterAssignment]] = {
    "features": by_features,
    "labels": by_labels,
    "random": by_random,
}


def _labels(seen: PartitionInputs, part: str) -> FineIds:
    shards = seen.dataset / part
    blocks = (np.array([encoded_label(sample)], np.int32) for sample in read_encoded(shards))
    return store_ids(seen.scratch / f"{part}_labels.npy", read_index(shards).count, blocks)


def _most_frequent(seen: PartitionInputs, training: Callable[[slice], ClusterIds]) -> Int64[np.ndarray, " fine"]:
    """The cluster in which most of the samples around every fine centroid are."""
    clusters = seen.config.num_experts
    votes = np.zeros(len(seen.centroids) * clusters, np.int64)
    for start in range(0, len(seen.fine_ids), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        cells = seen.fine_ids[rows].astype(np.int64) * clusters + training(rows)
        votes += np.bincount(cells, minlength=len(votes))
    found: Int64[np.ndarray, " fine"] = votes.reshape(-1, clusters).argmax(axis=1)
    return found
