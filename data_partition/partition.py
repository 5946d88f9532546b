"""The division of a data set into K clusters, one for each expert.

    features ──kmeans──► fine centroids ──consolidate──► fine_to_cluster ──assign──► a cluster for every image

A sample belongs to the cluster of its nearest fine centroid, and so does an image that was generated later. Samples may
be divided by their classes or by chance instead (`division.py`); generated images then are where their neighbours are.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64, Integer, UInt8
from safetensors.numpy import load_file

from data_partition.assignment import AssignmentTable, count_ids, store_ids, write_clusters
from data_partition.clustering.balanced_kmeans import distortion
from data_partition.clustering.kmeans import BLOCK_ROWS, fine_centroids, nearest, num_fine, training_rows
from data_partition.clustering.strategies import STRATEGIES, ClusterAssignment, PartitionInputs
from data_partition.config import PartitionConfig
from data_partition.errors import EmptyCluster, FeaturesMismatch
from data_partition.features.extract import FeatureExtractor, load_extractor
from data_partition.features.store import FEATURES, KEYS
from data_partition.progress import ProgressTracker
from data_partition.shards.shards import read_batches, read_index
from ddm_core.artifacts import Workspace, read_json, save_arrays, write_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """The sizes of the clusters; also written as `balance.json`."""

    counts: tuple[int, ...]
    holdout_counts: tuple[int, ...]
    holdout_looks: tuple[int, ...]
    """Held-out samples of each cluster by their looks alone, as generated images are counted; the same as
    `holdout_counts` where the features decide."""
    shares: tuple[float, ...]
    """Of the training samples."""
    smallest_over_mean: float
    largest_over_mean: float
    """Both are 1 for a perfect balance."""
    evenness: float
    """Entropy of the shares over that of equal shares, from 0 to 1."""
    num_fine: int
    distortion: float
    """Mean squared distance of a sample's fine centroid from the mean of its cluster."""
    class_names: tuple[str, ...]
    class_counts: tuple[tuple[int, ...], ...]
    """For each class, its training samples in each cluster."""


def evenness(counts: Int64[np.ndarray, " cluster"]) -> float:
    """Entropy of the shares over its maximum; 1 for a single cluster."""
    shares = counts[counts > 0] / counts.sum()
    return 1.0 if len(counts) == 1 else float(-(shares * np.log(shares)).sum() / np.log(len(counts)))


TENSORS, FACTS, EXTRACTOR = "partition.safetensors", "partition.json", "extractor"


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """Where the clusters lie in feature space, and how many training samples each has."""

    fine_centroids: Float32[np.ndarray, "fine feature"]
    fine_to_cluster: Int64[np.ndarray, " fine"]
    counts: Int64[np.ndarray, " cluster"]
    class_counts: Int64[np.ndarray, "class cluster"] | None = None
    """None: the samples carry no classes."""
    extractor: FeatureExtractor | None = None

    @property
    def num_clusters(self) -> int:
        """K."""
        return len(self.counts)

    def assign(self, features: Float32[np.ndarray, "batch feature"]) -> Int64[np.ndarray, " batch"]:
        """The cluster of each row of features."""
        ids: Int64[np.ndarray, " batch"] = self.fine_to_cluster[nearest(features, self.fine_centroids)]
        return ids

    def assign_images(self, images: UInt8[np.ndarray, "batch height width channel"]) -> Int64[np.ndarray, " batch"]:
        """The cluster of each image; raises `FeaturesMismatch` if the partition was loaded without its extractor."""
        if self.extractor is None:
            raise FeaturesMismatch("this partition has no extractor; use load_partition(folder), which brings it along")
        return self.assign(self.extractor(images))

    def save(self, folder: Path) -> None:
        """Write centroids and counts; the extractor is a folder of its own beside them."""
        tensors = {
            "fine_centroids": self.fine_centroids,
            "fine_to_cluster": self.fine_to_cluster,
            "counts": self.counts,
        }
        if self.class_counts is not None:
            tensors["class_counts"] = self.class_counts
        save_arrays(folder / TENSORS, tensors)
        fine, dimension = self.fine_centroids.shape
        write_json(folder / FACTS, {"num_clusters": self.num_clusters, "num_fine": fine, "dimension": dimension})

    @classmethod
    def load(cls, folder: Path) -> "Partition":
        """Read what `save` wrote."""
        found = load_file(folder / TENSORS)
        if len(found["counts"]) != read_json(folder / FACTS)["num_clusters"]:
            raise FeaturesMismatch(f"{folder}: {TENSORS} and {FACTS} belong to different partitions; partition again")
        return cls(
            fine_centroids=found["fine_centroids"],
            fine_to_cluster=found["fine_to_cluster"],
            counts=found["counts"],
            class_counts=found.get("class_counts"),
        )


def load_partition(folder: Path) -> Partition:
    """A partition with its extractor, so that it can assign images."""
    return replace(Partition.load(folder), extractor=load_extractor(folder / EXTRACTOR))


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionSummary:
    """How large the clusters are, and what finding them cost."""

    counts: tuple[int, ...]
    """Training samples of each cluster."""
    holdout_counts: tuple[int, ...]
    flops: float


def make_partition(
    config: PartitionConfig, dataset: Path, features: Path, out: Path, workspace: Workspace
) -> PartitionSummary:
    """Divide `dataset` by the features of its training samples, which `extract_features` wrote.

    Writes the partition, `assignment.csv`, `balance.json`, `clusters/<k>`, `holdout/<k>` and `extractor` into `out`.
    Raises `TooFewSamples`, `EmptyCluster`, `FeaturesMismatch`, or `Preempted` when it is asked to stop.
    """
    out.mkdir(parents=True, exist_ok=True)
    index, held_out = read_index(dataset / "train"), read_index(dataset / "holdout")
    values = open_features(features, index.count)
    watch = ProgressTracker(workspace, 2 * (index.count + held_out.count))
    fine = num_fine(config.num_fine, index.count, config.num_experts)
    centroids = fine_centroids(values, fine, config.iterations, config.seed)
    fine_ids = store_ids(
        workspace.scratch / "fine_ids.npy", index.count, watch.over(_nearest_blocks(values, centroids))
    )
    fine_counts = count_ids(fine_ids, fine, BLOCK_ROWS)
    division = STRATEGIES[config.by](
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
    partition = _counted(division, centroids, index.count, config.num_experts)
    partition = _write_training(partition, dataset / "train", features / KEYS, division, out, watch)
    partition.save(out)
    shutil.copytree(features / EXTRACTOR, out / EXTRACTOR, dirs_exist_ok=True)
    partition = replace(partition, extractor=load_extractor(out / EXTRACTOR))
    looks = _by_looks(partition, dataset / "holdout", config.batch_size, workspace.scratch, watch)
    holdouts = _write_holdout(
        partition, dataset / "holdout", division.holdout or (lambda rows: looks[rows]), out, watch
    )
    write_json(out / "balance.json", _balance(partition, fine_counts, index.class_names, holdouts, looks))
    return PartitionSummary(
        counts=tuple(partition.counts.tolist()),
        holdout_counts=holdouts,
        flops=_flops(config, partition, index.count, held_out.count),
    )


def open_features(folder: Path, count: int) -> Float32[np.ndarray, "sample feature"]:
    """The features in `folder`, memory-mapped; raises `FeaturesMismatch` if they are not `count` rows."""
    try:
        values: np.ndarray = np.load(folder / FEATURES, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise FeaturesMismatch(f"{folder / FEATURES} cannot be read ({error}); extract the features again") from error
    if values.ndim != 2 or len(values) != count:
        raise FeaturesMismatch(
            f"{folder / FEATURES} has shape {values.shape}, the data set {count} samples; extract its features again"
        )
    return values


def _nearest_blocks(
    values: Float32[np.ndarray, "sample feature"], centroids: Float32[np.ndarray, "fine feature"]
) -> Iterator[Int64[np.ndarray, " block"]]:
    for start in range(0, len(values), BLOCK_ROWS):
        yield nearest(values[start : start + BLOCK_ROWS], centroids)


def _counted(
    division: ClusterAssignment, centroids: Float32[np.ndarray, "fine feature"], count: int, clusters: int
) -> Partition:
    """The partition, still without its class counts."""
    blocks = (slice(start, start + BLOCK_ROWS) for start in range(0, count, BLOCK_ROWS))
    totals = sum(
        (np.bincount(division.training(rows), minlength=clusters) for rows in blocks), np.zeros(clusters, np.int64)
    )
    if (totals == 0).any():
        raise EmptyCluster(
            f"clusters {np.flatnonzero(totals == 0).tolist()} of {clusters} are empty; "
            f"set partition.num_experts to at most {np.count_nonzero(totals)}"
        )
    return Partition(fine_centroids=centroids, fine_to_cluster=division.fine_to_cluster, counts=totals)


def _write_training(
    partition: Partition,
    shards: Path,
    keys: Path,
    division: ClusterAssignment,
    out: Path,
    watch: ProgressTracker,
) -> Partition:
    """Write the clusters and their table; returns the partition with its class counts."""

    def cluster_of(row: int) -> int:
        return int(division.training(slice(row, row + 1))[0])

    shape = (len(read_index(shards).class_names), partition.num_clusters)
    with AssignmentTable(out / "assignment.csv", keys, cluster_of, shape) as table:
        write_clusters(shards, partition.num_clusters, out / "clusters", cluster_of, watch.each(table.add))
    return replace(partition, class_counts=table.class_counts if shape[0] else None)


def _by_looks(
    partition: Partition, shards: Path, batch_size: int, scratch: Path, watch: ProgressTracker
) -> Integer[np.ndarray, " sample"]:
    """The cluster of every held-out sample, known by its looks alone."""
    batches = (partition.assign_images(batch.images) for batch in read_batches(shards, batch_size))
    return store_ids(scratch / "holdout_ids.npy", read_index(shards).count, watch.over(batches))


def _write_holdout(
    partition: Partition,
    shards: Path,
    cluster_of: Callable[[slice], Integer[np.ndarray, " block"]],
    out: Path,
    watch: ProgressTracker,
) -> tuple[int, ...]:
    """Write the held-out samples by the same rule; returns how many each cluster has."""
    indices = write_clusters(
        shards,
        partition.num_clusters,
        out / "holdout",
        lambda row: int(cluster_of(slice(row, row + 1))[0]),
        watch.each(lambda row, sample: None),
    )
    return tuple(index.count for index in indices)


def _balance(
    partition: Partition,
    fine_counts: Int64[np.ndarray, " fine"],
    class_names: tuple[str, ...],
    holdout_counts: tuple[int, ...],
    looks: Integer[np.ndarray, " sample"],
) -> Balance:
    counts, total = partition.counts, partition.counts.sum()
    points, weights = partition.fine_centroids.astype(np.float64), fine_counts.astype(np.float64)
    return Balance(
        counts=tuple(counts.tolist()),
        holdout_counts=holdout_counts,
        holdout_looks=tuple(np.bincount(looks, minlength=len(counts)).tolist()),
        shares=tuple((counts / total).tolist()),
        smallest_over_mean=float(counts.min() / counts.mean()),
        largest_over_mean=float(counts.max() / counts.mean()),
        evenness=evenness(counts),
        num_fine=len(points),
        distortion=distortion(points, weights, partition.fine_to_cluster, len(counts)),
        class_names=class_names,
        class_counts=() if partition.class_counts is None else tuple(map(tuple, partition.class_counts.tolist())),
    )


def _flops(config: PartitionConfig, partition: Partition, count: int, held_out: int) -> float:
    """Two for each product in k-means and in assigning, and the features of the held-out samples."""
    fine, dimension = partition.fine_centroids.shape
    rows = len(training_rows(count, fine, config.seed)) * config.iterations + count + held_out
    features = 0.0 if partition.extractor is None else held_out * partition.extractor.flops_per_image
    return float(2 * rows * fine * dimension + features)
