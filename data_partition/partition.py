"""Partition of a data set into K clusters, one for each expert.

    features ──kmeans──► fine centroids ──merge──► fine_to_cluster ──assign──► one cluster per image

A sample belongs to the cluster of its nearest fine centroid; the same rule assigns generated images. Samples may be
divided by class or at random instead (`clustering/strategies.py`). A generated image then belongs to the cluster that
most training samples around its nearest fine centroid belong to.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64, Integer, UInt8
from safetensors.numpy import load_file

from data_partition.assignment import AssignmentTable, count_ids, store_ids, write_clusters
from data_partition.clustering.balanced_kmeans import distortion
from data_partition.clustering.kmeans import (
    BLOCK_ROWS,
    assign_nearest,
    choose_num_fine,
    choose_training_rows,
    fit_fine_centroids,
)
from data_partition.clustering.strategies import STRATEGIES, ClusterAssignment, PartitionInputs
from data_partition.config import PartitionConfig
from data_partition.errors import EmptyCluster, FeaturesMismatch
from data_partition.features.extract import FeatureExtractor, load_extractor
from data_partition.features.store import FEATURES, KEYS
from data_partition.progress import ProgressTracker
from data_partition.shards.shards import read_batches, read_index
from ddm_core.artifacts import Workspace, read_json, save_arrays, write_json
from ddm_core.engine import row_ranges


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """The sizes of the clusters; also written as `balance.json`."""

    counts: tuple[int, ...]
    holdout_counts: tuple[int, ...]
    holdout_looks: tuple[int, ...]
    """Held-out samples of each cluster when assigned by their features, like generated images; equal to
    `holdout_counts` for a partition by features."""
    shares: tuple[float, ...]
    """Share of each cluster in the training samples."""
    smallest_over_mean: float
    largest_over_mean: float
    """Both ratios are 1 for a perfect balance."""
    evenness: float
    """Entropy of the shares divided by that of equal shares, from 0 to 1."""
    num_fine: int
    distortion: float
    """Mean squared distance of a sample's fine centroid from the mean of its cluster."""
    class_names: tuple[str, ...]
    class_counts: tuple[tuple[int, ...], ...]
    """Training samples of each class in each cluster."""


def evenness(counts: Int64[np.ndarray, " cluster"]) -> float:
    """Return the entropy of the shares divided by its maximum; 1 for a single cluster."""
    shares = counts[counts > 0] / counts.sum()
    return 1.0 if len(counts) == 1 else float(-(shares * np.log(shares)).sum() / np.log(len(counts)))


PIECE_ROWS = 16 * BLOCK_ROWS
"""Rows of features that are assigned in one go."""

TENSORS, METADATA, EXTRACTOR = "partition.safetensors", "partition.json", "extractor"


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """Clusters in feature space: fine centroids, their clusters, and the number of training samples of each cluster."""

    fine_centroids: Float32[np.ndarray, "fine feature"]
    fine_to_cluster: Int64[np.ndarray, " fine"]
    counts: Int64[np.ndarray, " cluster"]
    class_counts: Int64[np.ndarray, "class cluster"] | None = None
    """None: the samples have no classes."""
    extractor: FeatureExtractor | None = None

    @property
    def num_clusters(self) -> int:
        """Return K."""
        return len(self.counts)

    def assign(self, features: Float32[np.ndarray, "batch feature"]) -> Int64[np.ndarray, " batch"]:
        """Return the cluster of each row of features."""
        ids: Int64[np.ndarray, " batch"] = self.fine_to_cluster[assign_nearest(features, self.fine_centroids)]
        return ids

    def assign_images(self, images: UInt8[np.ndarray, "batch height width channel"]) -> Int64[np.ndarray, " batch"]:
        """Return the cluster of each image; raises `FeaturesMismatch` for a partition loaded without its extractor."""
        if self.extractor is None:
            raise FeaturesMismatch("this partition has no extractor; use load_partition(folder), which loads it too")
        return self.assign(self.extractor(images))

    def save(self, folder: Path) -> None:
        """Write centroids and counts; the extractor has a folder of its own."""
        tensors = {
            "fine_centroids": self.fine_centroids,
            "fine_to_cluster": self.fine_to_cluster,
            "counts": self.counts,
        }
        if self.class_counts is not None:
            tensors["class_counts"] = self.class_counts
        save_arrays(folder / TENSORS, tensors)
        fine, dimension = self.fine_centroids.shape
        write_json(folder / METADATA, {"num_clusters": self.num_clusters, "num_fine": fine, "dimension": dimension})

    @classmethod
    def load(cls, folder: Path) -> "Partition":
        """Read what `save` wrote; raises `FeaturesMismatch` if its files belong to different partitions."""
        arrays = load_file(folder / TENSORS)
        if len(arrays["counts"]) != read_json(folder / METADATA)["num_clusters"]:
            raise FeaturesMismatch(f"{folder}: {TENSORS} and {METADATA} are of different partitions; partition again")
        return cls(
            fine_centroids=arrays["fine_centroids"],
            fine_to_cluster=arrays["fine_to_cluster"],
            counts=arrays["counts"],
            class_counts=arrays.get("class_counts"),
        )


def load_partition(folder: Path) -> Partition:
    """Load a partition with its extractor, so that it can assign images."""
    return replace(Partition.load(folder), extractor=load_extractor(folder / EXTRACTOR))


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionSummary:
    """The sizes of the clusters, and the FLOPs of the partition."""

    counts: tuple[int, ...]
    """Training samples of each cluster."""
    holdout_counts: tuple[int, ...]
    flops: float


def make_partition(
    config: PartitionConfig, dataset: Path, features: Path, out: Path, workspace: Workspace
) -> PartitionSummary:
    """Divide `dataset` into clusters by the features that `extract_features` wrote.

    Writes the partition, `assignment.csv`, `balance.json`, `clusters/<k>`, `holdout/<k>` and `extractor` into `out`.
    Raises `TooFewSamples`, `EmptyCluster`, `FeaturesMismatch`, or `Preempted` on a stop request.
    """
    out.mkdir(parents=True, exist_ok=True)
    index, held_out = read_index(dataset / "train"), read_index(dataset / "holdout")
    values = open_features(features, index.count)
    tracker = ProgressTracker(workspace, 2 * (index.count + held_out.count))
    fine = choose_num_fine(config.num_fine, index.count, config.num_experts)
    centroids = fit_fine_centroids(values, fine, config.iterations, config.seed)
    fine_ids = store_ids(
        workspace.scratch / "fine_ids.npy",
        index.count,
        tracker.track_batches(
            workspace.engine.map(
                partial(start_assignment, features, index.count, centroids), row_ranges(0, index.count, PIECE_ROWS)
            )
        ),
    )
    fine_counts = count_ids(fine_ids, fine, BLOCK_ROWS)
    assignment = STRATEGIES[config.by](
        PartitionInputs(
            config=config,
            dataset=dataset,
            features=values,
            centroids=centroids,
            fine_ids=fine_ids,
            fine_counts=fine_counts,
            scratch=workspace.scratch,
        )
    )
    partition = _count_clusters(assignment, centroids, index.count, config.num_experts)
    partition = _write_training(partition, dataset / "train", features / KEYS, assignment, out, tracker)
    partition.save(out)
    shutil.copytree(features / EXTRACTOR, out / EXTRACTOR, dirs_exist_ok=True)
    partition = replace(partition, extractor=load_extractor(out / EXTRACTOR))
    by_features = _assign_holdout(partition, dataset / "holdout", config.batch_size, workspace.scratch, tracker)
    holdouts = _write_holdout(
        partition, dataset / "holdout", assignment.holdout or (lambda rows: by_features[rows]), out, tracker
    )
    write_json(out / "balance.json", _measure_balance(partition, fine_counts, index.class_names, holdouts, by_features))
    return PartitionSummary(
        counts=tuple(partition.counts.tolist()),
        holdout_counts=holdouts,
        flops=_count_flops(config, partition, index.count, held_out.count),
    )


def open_features(folder: Path, count: int) -> Float32[np.ndarray, "sample feature"]:
    """Open the features in `folder`, memory-mapped; raises `FeaturesMismatch` unless they have `count` rows."""
    try:
        values: np.ndarray = np.load(folder / FEATURES, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise FeaturesMismatch(f"{folder / FEATURES} cannot be read ({error}); extract the features again") from error
    if values.ndim != 2 or len(values) != count:
        raise FeaturesMismatch(
            f"{folder / FEATURES} has shape {values.shape}, the data set {count} samples; extract its features again"
        )
    return values


def start_assignment(
    folder: Path, count: int, centroids: Float32[np.ndarray, "fine feature"]
) -> Callable[[tuple[int, int]], Iterator[Int64[np.ndarray, " block"]]]:
    """Return the function that yields the nearest fine centroids of the rows of a range, in blocks."""

    def assign(rows: tuple[int, int]) -> Iterator[Int64[np.ndarray, " block"]]:
        values = open_features(folder, count)  # for each range anew: what was read of it leaves the memory with it
        for start, stop in row_ranges(*rows, BLOCK_ROWS):
            yield assign_nearest(values[start:stop], centroids)

    return assign


def _count_clusters(
    assignment: ClusterAssignment, centroids: Float32[np.ndarray, "fine feature"], count: int, clusters: int
) -> Partition:
    """Count the samples of every cluster; the partition returned has no class counts yet."""
    blocks = (slice(start, start + BLOCK_ROWS) for start in range(0, count, BLOCK_ROWS))
    totals = sum(
        (np.bincount(assignment.training(rows), minlength=clusters) for rows in blocks), np.zeros(clusters, np.int64)
    )
    if (totals == 0).any():
        raise EmptyCluster(
            f"clusters {np.flatnonzero(totals == 0).tolist()} of {clusters} are empty; "
            f"set partition.num_experts to at most {np.count_nonzero(totals)}"
        )
    return Partition(fine_centroids=centroids, fine_to_cluster=assignment.fine_to_cluster, counts=totals)


def _write_training(
    partition: Partition,
    shards: Path,
    keys: Path,
    assignment: ClusterAssignment,
    out: Path,
    tracker: ProgressTracker,
) -> Partition:
    """Write the clusters and their table; return the partition with its class counts."""

    def cluster_of(row: int) -> int:
        return int(assignment.training(slice(row, row + 1))[0])

    shape = (len(read_index(shards).class_names), partition.num_clusters)
    with AssignmentTable(out / "assignment.csv", keys, cluster_of, shape) as table:
        write_clusters(shards, partition.num_clusters, out / "clusters", cluster_of, tracker.track_callback(table.add))
    return replace(partition, class_counts=table.class_counts if shape[0] else None)


def _assign_holdout(
    partition: Partition, shards: Path, batch_size: int, scratch: Path, tracker: ProgressTracker
) -> Integer[np.ndarray, " sample"]:
    """Assign every held-out sample to a cluster by its features."""
    batches = (partition.assign_images(batch.images) for batch in read_batches(shards, batch_size))
    return store_ids(scratch / "holdout_ids.npy", read_index(shards).count, tracker.track_batches(batches))


def _write_holdout(
    partition: Partition,
    shards: Path,
    cluster_of: Callable[[slice], Integer[np.ndarray, " block"]],
    out: Path,
    tracker: ProgressTracker,
) -> tuple[int, ...]:
    """Write the held-out samples of every cluster; return how many each cluster has."""
    indices = write_clusters(
        shards,
        partition.num_clusters,
        out / "holdout",
        lambda row: int(cluster_of(slice(row, row + 1))[0]),
        tracker.track_callback(lambda row, sample: None),
    )
    return tuple(index.count for index in indices)


def _measure_balance(
    partition: Partition,
    fine_counts: Int64[np.ndarray, " fine"],
    class_names: tuple[str, ...],
    holdout_counts: tuple[int, ...],
    by_features: Integer[np.ndarray, " sample"],
) -> Balance:
    counts, total = partition.counts, partition.counts.sum()
    points, weights = partition.fine_centroids.astype(np.float64), fine_counts.astype(np.float64)
    return Balance(
        counts=tuple(counts.tolist()),
        holdout_counts=holdout_counts,
        holdout_looks=tuple(np.bincount(by_features, minlength=len(counts)).tolist()),
        shares=tuple((counts / total).tolist()),
        smallest_over_mean=float(counts.min() / counts.mean()),
        largest_over_mean=float(counts.max() / counts.mean()),
        evenness=evenness(counts),
        num_fine=len(points),
        distortion=distortion(points, weights, partition.fine_to_cluster, len(counts)),
        class_names=class_names,
        class_counts=() if partition.class_counts is None else tuple(map(tuple, partition.class_counts.tolist())),
    )


def _count_flops(config: PartitionConfig, partition: Partition, count: int, held_out: int) -> float:
    """Count two FLOPs per product in k-means and in assignment, plus the features of the held-out samples."""
    fine, dimension = partition.fine_centroids.shape
    rows = len(choose_training_rows(count, fine, config.seed)) * config.iterations + count + held_out
    features = 0.0 if partition.extractor is None else held_out * partition.extractor.flops_per_image
    return float(2 * rows * fine * dimension + features)
