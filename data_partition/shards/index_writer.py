"""Write an offset index: the same interface as `ShardWriter`, for samples that stay in tars of the user."""

import json
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from data_partition.config import DataConfig
from data_partition.errors import ShardError
from data_partition.shards.offset_index import OFFSETS, ROW, TEXTS, OffsetIndex, SourceTar, digest, rows_checksum
from data_partition.shards.shards import (
    INDEX,
    Sample,
    Shape,
    ShardIndex,
    StreamSource,
    encode_sample,
    identify_sample,
    shard_name,
)
from data_partition.shards.urls import read_range
from ddm_core.artifacts import to_jsonable, write_record
from ddm_core.url_queries import without_secrets


class OffsetIndexWriter:
    """Appends samples to a folder; `close` writes the index, and a folder without an index is unfinished."""

    def __init__(
        self,
        folder: Path,
        config: DataConfig,
        image_shape: Shape,
        class_names: tuple[str, ...] = (),
        buckets: tuple[Shape, ...] = (),
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.config, self.image_shape, self.class_names = folder, config, image_shape, class_names
        self.buckets = buckets
        self.count = 0
        """Samples written so far."""
        self.tars: list[SourceTar] = []
        self.shard_counts: list[int] = []
        self.shard_buckets: list[int] = []
        self._checksums: list[str] = []
        self._tar: SourceTar | None = None
        self._pending: dict[int, tuple[bytearray, bytearray]] = {}
        """Rows and texts of the current tar, by the bucket of their images; `text_end` counts from the first."""
        self._text_end = 0
        self._files: list[BinaryIO] = [(folder / name).open("wb") for name in (OFFSETS, TEXTS)]

    def __enter__(self) -> "OffsetIndexWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()

    def add(self, sample: Sample) -> None:
        """Append a sample of a tar; raises `ShardError` if no range of the tar has its image."""
        place = sample.place
        if place is None:
            raise ValueError(f"{sample.key} is in no tar; read it with data.mode=stream")
        if self._tar != place.tar:
            data = read_range(place.tar.url, place.start, place.start + place.length)
            if digest(data) != place.digest:
                raise ShardError(
                    f"{without_secrets(place.tar.url)} cannot be read in ranges: it is compressed, or changes while it "
                    "is read; unpack it, or set data.mode=copy"
                )
        row = np.zeros(1, ROW)
        row["offset"], row["length"], row["digest"] = place.start, place.length, place.digest
        row["sample_id"], row["label"] = identify_sample(encode_sample(sample)), sample.label
        text = json.dumps([sample.key, sample.caption, sample.more_captions]).encode()
        bucket = (self.image_shape, *self.buckets).index(sample.image.shape) if self.buckets else 0
        self.append(place.tar, row, text, bucket)

    def copy_row(self, index: OffsetIndex, row: int) -> None:
        """Append a sample of another index."""
        (stored, text), shard = index.raw(row), index.tar_of(row)
        bucket = index.shard_buckets[shard] if index.shard_buckets else 0
        self.append(index.tars[shard], np.array([stored], ROW), text, bucket)

    def close(self) -> ShardIndex:
        """Finish the last tar and write the index."""
        self._flush()
        for file in self._files:
            file.close()
        index = ShardIndex(
            count=self.count,
            image_shape=self.image_shape,
            class_names=self.class_names,
            shards=tuple(shard_name(number) for number in range(len(self.tars))),
            shard_counts=tuple(self.shard_counts),
            checksums=tuple(self._checksums),
            buckets=self.buckets,
            shard_buckets=tuple(self.shard_buckets) if self.buckets else (),
            source=StreamSource(tars=tuple(self.tars), config=replace(self.config, engine="local")),
        )
        write_record(self.folder / INDEX, to_jsonable(index))
        return index

    def append(self, tar: SourceTar, row: np.ndarray, text: bytes, bucket: int = 0) -> None:
        """Append a row as it is stored, whose image is in `tar` and of a bucket's shape; its `text_end` is set."""
        if self._tar != tar:
            self._flush()
            self._tar = tar
        rows, texts = self._pending.setdefault(bucket, (bytearray(), bytearray()))
        texts += text
        row["text_end"] = len(texts)
        rows += row.tobytes()
        self.count += 1

    def _flush(self) -> None:
        """Write the rows of the current tar, those of each bucket together."""
        if (tar := self._tar) is None:
            return
        for bucket, (content, texts) in sorted(self._pending.items()):
            rows = np.frombuffer(content, ROW).copy()
            rows["text_end"] += self._text_end
            self._text_end += len(texts)
            for file, data in zip(self._files, (rows.tobytes(), bytes(texts)), strict=True):
                file.write(data)
            self._checksums.append(rows_checksum(rows.tobytes(), bytes(texts)))
            self.tars.append(tar)
            self.shard_counts.append(len(rows))
            self.shard_buckets.append(bucket)
        self._pending = {}
