"""Samples sorted into one folder of shards for each cluster, as a stream."""

import contextlib
from collections.abc import Callable
from pathlib import Path

from data_partition.shards import ShardIndex, ShardWriter, read_encoded, read_index
from data_partition.tars import Encoded

OPEN_CLUSTERS = 64
"""Tars written at once; with more clusters, the shards are read several times."""


def write_clusters(
    shards: Path,
    num_clusters: int,
    out: Path,
    cluster_of: Callable[[int], int],
    on_sample: Callable[[int, Encoded], None],
) -> list[ShardIndex]:
    """Copy sample i of `shards` into `out/<cluster_of(i)>`, still encoded and in the same order.

    `on_sample` is called once for each sample, in order, before it is copied.
    """
    indices: list[ShardIndex] = []
    for first in range(0, num_clusters, OPEN_CLUSTERS):
        writers = _writers(shards, range(first, min(first + OPEN_CLUSTERS, num_clusters)), out)
        with contextlib.ExitStack() as stack:
            for writer in writers.values():
                stack.enter_context(writer)
            for row, encoded in enumerate(read_encoded(shards)):
                if first == 0:
                    on_sample(row, encoded)
                if cluster_of(row) in writers:
                    writers[cluster_of(row)].add_encoded(encoded)
            indices += [writer.close() for writer in writers.values()]
    return indices


def _writers(shards: Path, wanted: range, out: Path) -> dict[int, ShardWriter]:
    index = read_index(shards)
    largest = max(index.shard_counts, default=1)
    return {
        cluster_id: ShardWriter(out / str(cluster_id), largest, index.class_names, index.image_shape)
        for cluster_id in wanted
    }
