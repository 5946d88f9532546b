"""Join folders of shards: the samples of the first, then those of the second, and so on."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data_partition.errors import ShardError
from data_partition.shards.index_writer import OffsetIndexWriter
from data_partition.shards.shards import ShardIndex, open_offsets, read_index, shard_name, write_index
from ddm_core.files.links import link_or_copy


def join_shards(folders: Sequence[Path], out: Path) -> ShardIndex:
    """Write all samples of some folders into one; tars get a second name, and no image is read.

    Raises `ShardError` if their images have different shapes or classes, or only some are offset indices.
    """
    indices = [read_index(folder) for folder in folders]
    first = indices[0]
    if any(_layout(index) != _layout(first) for index in indices):
        raise ShardError(
            f"{', '.join(map(str, folders))} differ in the shapes of images, their classes or data.mode, and cannot be "
            "joined; read all of them with the settings of the first"
        )
    if first.source is not None:
        with OffsetIndexWriter(out, first.source.config, first.image_shape, first.class_names, first.buckets) as writer:
            for folder in folders:
                offsets, _ = open_offsets(folder)
                for row in range(len(offsets.rows)):
                    writer.copy_row(offsets, row)
            return writer.close()
    out.mkdir(parents=True, exist_ok=True)
    tars = [folder / name for folder, index in zip(folders, indices, strict=True) for name in index.shards]
    names = tuple(shard_name(number) for number in range(len(tars)))
    for tar, name in zip(tars, names, strict=True):
        link_or_copy(tar, out / name)
    joined = replace(
        first,
        count=sum(index.count for index in indices),
        shards=names,
        shard_counts=tuple(count for index in indices for count in index.shard_counts),
        checksums=tuple(digest for index in indices for digest in index.checksums),
        shard_buckets=tuple(bucket for index in indices for bucket in index.shard_buckets),
    )
    write_index(out, joined)
    return joined


def _layout(index: ShardIndex) -> tuple[object, ...]:
    return index.image_shape, index.buckets, index.class_names, index.source is None
