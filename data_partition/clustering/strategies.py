"""Strategies that assign samples to clusters: by features, by class, or at random.

features   the cluster of the nearest fine centroid
labels     the cluster of the class; with fewer clusters than classes, classes with similar features share a cluster
random     a random cluster: the baseline for the other two

To add a strategy, write the function and add it to `STRATEGIES`.
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
from data_partition.shards.shards import read_index, read_labels
from ddm_core.random_bits import splitmix64_finalize

FineIds = Integer[np.ndarray, " sample"]
ClusterIds = Int64[np.ndarray, " block"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionInputs:
    """Inputs of a strategy."""

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
    """Clusters of all samples, by their row in the shards."""

    fine_to_cluster: Int64[np.ndarray, " fine"]
    """Cluster of a generated image with this nearest fine centroid: that of most training samples around it."""
    training: Callable[[slice], ClusterIds]
    """Clusters of a slice of the training samples."""
    holdout: Callable[[slice], ClusterIds] | None = None
    """Clusters of a slice of the held-out samples; None: by their nearest fine centroid."""


def assign_by_features(inputs: PartitionInputs) -> ClusterAssignment:
    """Merge the fine centroids of k-means into clusters."""
    config = inputs.config
    ids = merge_centroids(inputs.centroids, inputs.fine_counts, config.num_experts, config.balanced, config.seed)
    return ClusterAssignment(fine_to_cluster=ids, training=lambda rows: ids[inputs.fine_ids[rows]])


def assign_by_labels(inputs: PartitionInputs) -> ClusterAssignment:
    """Merge classes into clusters by their mean features; raises `MissingLabels` or `EmptyCluster`."""
    config, classes = inputs.config, len(read_index(inputs.dataset / "train").class_names)
    labels = {part: _load_labels(inputs, part) for part in ("train", "holdout")}
    if not classes or min(ids.min(initial=0) for ids in labels.values()) < 0:
        raise MissingLabels(
            "partition.by=labels needs a class for every sample, and some have none; use partition.by=features"
        )
    counts = np.bincount(labels["train"], minlength=classes)
    if np.count_nonzero(counts) < config.num_experts:
        raise EmptyCluster(
            f"{np.count_nonzero(counts)} classes cannot be {config.num_experts} clusters; "
            f"set partition.num_experts to at most {np.count_nonzero(counts)}, or partition.by=features"
        )
    means = np.stack([np.bincount(labels["train"], column, classes) for column in inputs.features.T], axis=1)
    means = (means / np.maximum(counts, 1)[:, None]).astype(np.float32)
    cluster_of = merge_centroids(means, counts, config.num_experts, config.balanced, config.seed)

    def training(rows: slice) -> ClusterIds:
        ids: ClusterIds = cluster_of[labels["train"][rows]]
        return ids

    return ClusterAssignment(
        fine_to_cluster=_majority_clusters(inputs, training),
        training=training,
        holdout=lambda rows: cluster_of[labels["holdout"][rows]],
    )


def assign_by_random(inputs: PartitionInputs) -> ClusterAssignment:
    """Assign samples at random, by a hash of seed, part and row: clusters have equal expected size."""

    def hash_rows(part: str) -> Callable[[slice], ClusterIds]:
        count = read_index(inputs.dataset / part).count
        return lambda rows: hash_clusters(inputs.config, part, slice(*rows.indices(count)))

    training, holdout = hash_rows("train"), hash_rows("holdout")
    return ClusterAssignment(fine_to_cluster=_majority_clusters(inputs, training), training=training, holdout=holdout)


def hash_clusters(config: PartitionConfig, part: str, rows: slice) -> ClusterIds:
    """Return random clusters of the rows of `train` or `holdout`, from `rows.start` to `rows.stop`."""
    keys = np.arange(rows.start, rows.stop, rows.step, dtype=np.uint64)
    seed = np.uint64(config.seed % 2**32) << np.uint64(48)
    mixed = splitmix64_finalize((keys + np.uint64((part == "holdout") << 40)) ^ seed)
    return (mixed % np.uint64(config.num_experts)).astype(np.int64)


STRATEGIES: dict[str, Callable[[PartitionInputs], ClusterAssignment]] = {
    "features": assign_by_features,
    "labels": assign_by_labels,
    "random": assign_by_random,
}


def _load_labels(inputs: PartitionInputs, part: str) -> FineIds:
    shards = inputs.dataset / part
    blocks = (np.array([label], np.int32) for label in read_labels(shards))
    return store_ids(inputs.scratch / f"{part}_labels.npy", read_index(shards).count, blocks)


def _majority_clusters(inputs: PartitionInputs, training: Callable[[slice], ClusterIds]) -> Int64[np.ndarray, " fine"]:
    """Return the cluster of most samples around every fine centroid."""
    clusters = inputs.config.num_experts
    votes = np.zeros(len(inputs.centroids) * clusters, np.int64)
    for start in range(0, len(inputs.fine_ids), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        cells = inputs.fine_ids[rows].astype(np.int64) * clusters + training(rows)
        votes += np.bincount(cells, minlength=len(votes))
    majority: Int64[np.ndarray, " fine"] = votes.reshape(-1, clusters).argmax(axis=1)
    return majority
