"""A later delivery of data: its samples join the clusters that are there, and no centroid moves.

A sample gets the cluster of its nearest fine centroid. Where clusters were made by class, it gets the cluster that has
its class; where they were made at random, the hash of its row, counted on from the last sample.
"""

import csv
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Int64, Integer

from data_partition.assignment import store_ids, write_clusters
from data_partition.clustering.strategies import hash_clusters
from data_partition.config import PartitionConfig
from data_partition.errors import FeaturesMismatch
from data_partition.features.extract import iter_batches
from data_partition.partition import EXTRACTOR, Partition, PartitionSummary, evenness, load_partition
from data_partition.progress import ProgressTracker
from data_partition.shards.join import join_shards
from data_partition.shards.shards import decode_label, read_index, read_labels
from data_partition.shards.tar import Encoded
from ddm_core.artifacts import Workspace, read_json, write_json
from ddm_core.engine import row_ranges

PIECE_BATCHES = 8
"""Batches of images that are read in one go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """What a delivery is added to, and where its own clusters are written."""

    config: PartitionConfig
    earlier: Path
    """The partition, as `make_partition` or `add_delivery` wrote it."""
    dataset: Path
    """The samples, with the classes of the earlier ones."""
    workspace: Workspace

    def clusters(self, part: str) -> Path:
        """Return the folder of the clusters of `train` or `holdout`, of this delivery alone."""
        return self.workspace.scratch / "delivery" / part


def add_delivery(delivery: Delivery, out: Path) -> PartitionSummary:
    """Write a partition of the earlier samples and those of a delivery into `out`, as `make_partition` does.

    Returns the sizes of all clusters, and the FLOPs of the delivery alone. Raises `FeaturesMismatch`, `ShardError`, or
    `Preempted` on a stop request.
    """
    out.mkdir(parents=True, exist_ok=True)
    partition, earlier = load_partition(delivery.earlier), delivery.earlier
    counts = {part: read_index(delivery.dataset / part).count for part in ("train", "holdout")}
    tracker = ProgressTracker(delivery.workspace, 2 * sum(counts.values()))
    shutil.copyfile(earlier / "assignment.csv", out / "assignment.csv")
    shutil.copytree(earlier / EXTRACTOR, out / EXTRACTOR, dirs_exist_ok=True)
    class_counts = partition.class_counts
    joined: dict[str, tuple[int, ...]] = {}
    with (out / "assignment.csv").open("a", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        for part, folder in (("train", "clusters"), ("holdout", "holdout")):
            ids = _assign(delivery, partition, part, tracker)

            def count(row: int, sample: Encoded, ids: Integer[np.ndarray, " sample"] = ids, part: str = part) -> None:
                if part == "train":
                    table.writerow((sample.key, int(ids[row])))
                    if class_counts is not None and (label := decode_label(sample)) >= 0:
                        class_counts[label, ids[row]] += 1

            shutil.rmtree(delivery.clusters(part), ignore_errors=True)
            write_clusters(
                delivery.dataset / part,
                partition.num_clusters,
                delivery.clusters(part),
                lambda row, ids=ids: int(ids[row]),
                tracker.track_callback(count),
            )
            joined[part] = tuple(
                join_shards([earlier / folder / str(k), delivery.clusters(part) / str(k)], out / folder / str(k)).count
                for k in range(partition.num_clusters)
            )
    totals = np.array(joined["train"], dtype=np.int64)
    Partition(
        fine_centroids=partition.fine_centroids,
        fine_to_cluster=partition.fine_to_cluster,
        counts=totals,
        class_counts=class_counts,
    ).save(out)
    write_json(out / "balance.json", _update_balance(delivery, totals, joined["holdout"], class_counts))
    flops = 0.0 if partition.extractor is None else sum(counts.values()) * partition.extractor.flops_per_image
    flops += 2.0 * sum(counts.values()) * partition.fine_centroids.size
    return PartitionSummary(
        counts=joined["train"],
        holdout_counts=joined["holdout"],
        flops=flops if delivery.config.by == "features" else 0.0,
    )


def _assign(
    delivery: Delivery, partition: Partition, part: str, tracker: ProgressTracker
) -> Integer[np.ndarray, " sample"]:
    """Return the cluster of every sample of a part, in a memory-mapped file."""
    shards, config, earlier = delivery.dataset / part, delivery.config, delivery.earlier
    count = read_index(shards).count
    if config.by == "features":
        pieces = row_ranges(0, count, PIECE_BATCHES * config.batch_size)
        blocks: Iterator[Int64[np.ndarray, " block"]] = delivery.workspace.engine.map(
            partial(_start_assignment, earlier, shards, config.batch_size), pieces
        )
    elif config.by == "labels":
        if partition.class_counts is None:
            raise FeaturesMismatch(f"{earlier} has no classes, so partition.by=labels cannot be; partition again")
        cluster_of = partition.class_counts.argmax(axis=1)
        blocks = (cluster_of[np.array([label])] for label in read_labels(shards))
    else:
        folder = earlier / ("clusters" if part == "train" else "holdout")
        first = sum(read_index(folder / str(k)).count for k in range(partition.num_clusters))
        rows = slice(first, first + count)
        blocks = iter([hash_clusters(config, part, rows)])
    return store_ids(delivery.workspace.scratch / f"{part}_ids.npy", count, tracker.track_batches(blocks))


def _start_assignment(
    earlier: Path, shards: Path, batch_size: int
) -> Callable[[tuple[int, int]], Iterator[Int64[np.ndarray, " block"]]]:
    """Return the function that yields the clusters of the images of a range, in batches."""
    partition = load_partition(earlier)

    def assign(rows: tuple[int, int]) -> Iterator[Int64[np.ndarray, " block"]]:
        for batch in iter_batches(shards, batch_size, *rows):
            yield partition.assign_images(batch.images)

    return assign


def _update_balance(
    delivery: Delivery,
    counts: Int64[np.ndarray, " cluster"],
    holdout_counts: tuple[int, ...],
    class_counts: Int64[np.ndarray, "class cluster"] | None,
) -> dict[str, object]:
    """Return the earlier `balance.json` with the new sizes; the distortion is that of the first samples."""
    balance: dict[str, object] = read_json(delivery.earlier / "balance.json")
    earlier_counts, looks = balance["holdout_counts"], balance["holdout_looks"]
    added = np.array(holdout_counts) - np.array(earlier_counts)
    return balance | {
        "counts": counts.tolist(),
        "holdout_counts": holdout_counts,
        "holdout_looks": (np.array(looks) + added).tolist(),
        "shares": (counts / counts.sum()).tolist(),
        "smallest_over_mean": float(counts.min() / counts.mean()),
        "largest_over_mean": float(counts.max() / counts.mean()),
        "evenness": evenness(counts),
        "class_counts": () if class_counts is None else class_counts.tolist(),
    }
