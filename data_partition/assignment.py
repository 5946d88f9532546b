"""The table that maps training samples to clusters, and the shards of every cluster."""

import contextlib
import csv
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

import numpy as np
from jaxtyping import Integer

from data_partition.errors import FeaturesMismatch
from data_partition.shards.index_writer import OffsetIndexWriter
from data_partition.shards.shards import (
    ShardIndex,
    ShardWriter,
    decode_label,
    open_offsets,
    read_encoded,
    read_index,
)
from data_partition.shards.tar import Encoded
from ddm_core.files.memmaps import create_memmap


class AssignmentTable:
    """Writer of `assignment.csv`, one line per sample; it also counts the classes of every cluster."""

    def __init__(self, path: Path, keys: Path, cluster_of: Callable[[int], int], shape: tuple[int, int]) -> None:
        self._file = path.open("w", encoding="utf-8", newline="")
        self._keys = keys.open(encoding="utf-8", newline="\n")
        self._table = csv.writer(self._file, lineterminator="\n")
        self._table.writerow(("key", "cluster_id"))
        self._cluster_of = cluster_of
        self.class_counts = np.zeros(shape, dtype=np.int64)
        """[class cluster]"""

    def __enter__(self) -> "AssignmentTable":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._keys.close()

    def add(self, row: int, sample: Encoded) -> None:
        """Write the line of one sample; raises `FeaturesMismatch` if its features belong to another sample."""
        key = self._keys.readline().rstrip("\n")
        if key != sample.key:
            raise FeaturesMismatch(
                f"row {row} of the features belongs to {key!r}, but of the data set to {sample.key!r}; "
                "extract the features of this data set again"
            )
        cluster_id, label = self._cluster_of(row), decode_label(sample)
        self._table.writerow((sample.key, cluster_id))
        if 0 <= label < len(self.class_counts):
            self.class_counts[label, cluster_id] += 1


def store_ids(
    path: Path, count: int, batches: Iterable[Integer[np.ndarray, " batch"]]
) -> Integer[np.ndarray, " sample"]:
    """Write the ids of all batches to a memory-mapped file and return it."""
    if count == 0:
        return np.zeros(0, dtype=np.int32)
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = create_memmap(path, np.int32, (count,))
    start = 0
    for ids in batches:
        stored[start : start + len(ids)] = ids
        start += len(ids)
    return stored


def count_ids(ids: Integer[np.ndarray, " sample"], num: int, block_rows: int) -> Integer[np.ndarray, " num"]:
    """Count how often each of `num` ids occurs, in blocks."""
    blocks = (ids[start : start + block_rows] for start in range(0, len(ids), block_rows))
    return sum((np.bincount(block, minlength=num) for block in blocks), np.zeros(num, dtype=np.int64))


OPEN_TARS = 64
"""Tars open for writing at the same time; with more clusters, the shards are read several times."""


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
    index = read_index(shards)
    if index.source is not None:
        return _index_clusters(shards, index, num_clusters, out, cluster_of, on_sample)
    step = -(-OPEN_TARS // len(index.image_shapes))
    for first in range(0, num_clusters, step):
        writers = _open_writers(index, range(first, min(first + step, num_clusters)), out)
        with contextlib.ExitStack() as stack:
            for writer in writers.values():
                stack.enter_context(writer)
            for row, (encoded, shape) in enumerate(zip(read_encoded(shards), index.row_shapes, strict=True)):
                if first == 0:
                    on_sample(row, encoded)
                if cluster_of(row) in writers:
                    writers[cluster_of(row)].add_encoded(encoded, shape)
            indices += [writer.close() for writer in writers.values()]
    return indices


def _index_clusters(
    shards: Path,
    index: ShardIndex,
    num_clusters: int,
    out: Path,
    cluster_of: Callable[[int], int],
    on_sample: Callable[[int, Encoded], None],
) -> list[ShardIndex]:
    """Divide an offset index, likewise; no image is read, and `on_sample` gets the key and the class alone."""
    offsets, config = open_offsets(shards)
    indices = []
    for first in range(0, num_clusters, OPEN_TARS // 2):
        with contextlib.ExitStack() as stack:
            writers = {
                k: stack.enter_context(
                    OffsetIndexWriter(out / str(k), config, index.image_shape, index.class_names, index.buckets)
                )
                for k in range(first, min(first + OPEN_TARS // 2, num_clusters))
            }
            for row in range(index.count):
                if first == 0:
                    label = str(offsets.rows["label"][row]).encode()
                    on_sample(row, Encoded(key=offsets.text(row)[0], files={"cls": label}))
                if cluster_of(row) in writers:
                    writers[cluster_of(row)].copy_row(offsets, row)
            indices += [writer.close() for writer in writers.values()]
    return indices


def _open_writers(index: ShardIndex, cluster_ids: range, out: Path) -> dict[int, ShardWriter]:
    largest = max(index.shard_counts, default=1)
    return {
        cluster_id: ShardWriter(out / str(cluster_id), largest, index.class_names, index.image_shape, index.buckets)
        for cluster_id in cluster_ids
    }
