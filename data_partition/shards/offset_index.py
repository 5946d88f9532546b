"""The offset index: where the images of samples lie in tars of the user, so that each is read by one range of bytes.

    folder/offsets.bin    one row a sample; those of a tar and of one shape are together, in its order
    folder/texts.bin      key and captions of every sample, as JSON

Every image is compared with its hash when it is read: a tar that was changed or cut after it was indexed is an error.
"""

import hashlib
import itertools
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from data_partition.errors import DataError, ShardChanged, ShardError
from data_partition.shards.urls import describe_url, is_local, read_range
from ddm_core.url_queries import without_secrets

OFFSETS, TEXTS = "offsets.bin", "texts.bin"

ROW = np.dtype(
    [
        ("offset", "<i8"),
        ("length", "<i8"),
        ("digest", "<i8"),
        ("sample_id", "<i8"),
        ("text_end", "<i8"),
        ("label", "<i4"),
    ]
)
"""Where an image is in its tar, its hash, that of the sample as a copy has it, the end of its text, and its class."""

MAX_GAP = 2**17
"""Images closer than so many bytes are read by one range: a request costs as much as the gap."""

MAX_WINDOW = 2**23
"""Bytes of one range, beyond a single image."""

WINDOWS_AHEAD = 4
"""Ranges that are read at the same time, where a whole folder is read in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceTar:
    """A tar of the user as it was indexed."""

    url: str
    size: int
    etag: str = ""


@dataclass(frozen=True, slots=True)
class ImagePlace:
    """Where the image of a sample is."""

    tar: SourceTar
    start: int
    length: int
    digest: int


def describe_tar(url: str) -> SourceTar:
    """Return a tar as it is now; raises like `describe_url`."""
    state = describe_url(url)
    return SourceTar(url=url, size=state.size, etag=state.etag)


def digest(data: bytes) -> int:
    """Return 64 bits of a hash of an image file, as a signed number."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)


class OffsetIndex:
    """The rows of a folder, memory-mapped, and the images that they name."""

    def __init__(
        self,
        folder: Path,
        tars: Sequence[SourceTar],
        counts: Sequence[int],
        checksums: Sequence[str],
        shard_buckets: Sequence[int] = (),
    ) -> None:
        """Open a folder; raises `ShardError` if its files have not as many rows as the tars."""
        self.folder, self.tars, self.checksums = folder, tuple(tars), tuple(checksums)
        self.shard_buckets = tuple(shard_buckets)
        """Position of the shape of the images of each tar; empty: all have one. A tar of several is there for each."""
        self.ends = np.cumsum([0, *counts], dtype=np.int64)
        """First row of every tar, and the number of rows."""
        self.rows = _map(folder / OFFSETS, ROW)
        self._texts = _map(folder / TEXTS, np.dtype(np.uint8))
        self._verified: set[int] = set()
        if len(self.rows) != self.ends[-1] or len(self._texts) != (self.rows["text_end"][-1] if len(self.rows) else 0):
            raise ShardError(f"{folder} has not the rows that its index lists; run the stage that wrote it again")

    def rows_of(self, tar: int) -> range:
        """Return the rows of a tar; raises `ShardError` the first time if they differ from their checksum."""
        first, stop = int(self.ends[tar]), int(self.ends[tar + 1])
        if tar not in self._verified:
            if self._checksum(first, stop) != self.checksums[tar]:
                raise ShardError(f"{self.folder / OFFSETS} is corrupt, by its checksum; run the stage again")
            self._verified.add(tar)
        return range(first, stop)

    def tar_of(self, row: int) -> int:
        """Return the position of the tar of a row."""
        return int(np.searchsorted(self.ends, row, "right")) - 1

    def text(self, row: int) -> tuple[str, str, list[tuple[str, float]]]:
        """Return key, first caption and further captions of a sample."""
        key, caption, more = json.loads(self._text(row))
        return key, caption, [(str(text), float(frequency)) for text, frequency in more]

    def raw(self, row: int) -> tuple[Any, bytes]:
        """Return a row as it is stored, and its text, for another index."""
        return self.rows[row], self._text(row)

    def read(self, row: int) -> bytes:
        """Return the image file of one row, by one range; raises `ShardChanged`, or like `read_range`."""
        return self.read_window(range(row, row + 1))[0]

    def windows(self, rows: Iterable[int]) -> Iterator[range]:
        """Divide consecutive rows of one tar into those that one range is read for."""
        first = last = -1
        for row in rows:
            start, stop = int(self.rows["offset"][row]), int(self.rows["offset"][row] + self.rows["length"][row])
            if first >= 0 and (start - last > MAX_GAP or stop - int(self.rows["offset"][first]) > MAX_WINDOW):
                yield range(first, row)
                first = -1
            first, last, end = (row if first < 0 else first), stop, row + 1
        if first >= 0:
            yield range(first, end)

    def read_window(self, rows: range) -> list[bytes]:
        """Return the image files of consecutive rows of one tar, by one range; raises like `read`."""
        tar, block = self.tars[self.tar_of(rows.start)], self.rows[rows.start : rows.stop]
        start, stop = int(block["offset"][0]), int(block["offset"][-1] + block["length"][-1])
        try:
            data = read_range(tar.url, start, stop)
        except DataError:
            self._check_unchanged(tar)
            raise
        starts = (block["offset"] - start).tolist()
        files = [data[at : at + length] for at, length in zip(starts, block["length"].tolist(), strict=True)]
        for row, file in zip(rows, files, strict=True):
            if not self.is_intact(row, file):
                self._check_unchanged(tar)
                key, _, _ = self.text(row)
                raise ShardChanged(
                    f"sample {key!r} of {without_secrets(tar.url)} is not as it was indexed, though the file has the "
                    "same size; restore the file, or index it again with another data.version"
                )
        return files

    def is_intact(self, row: int, data: bytes) -> bool:
        """Return whether this is the image file of a row."""
        return digest(data) == int(self.rows["digest"][row])

    def read_in_order(self, start: int = 0) -> Iterator[tuple[int, bytes]]:
        """Yield the rows from `start` on with their image files; the next ranges are read meanwhile."""
        tars = range(self.tar_of(start), len(self.tars)) if start < len(self.rows) else range(0)
        windows = (window for tar in tars for window in self.windows(row for row in self.rows_of(tar) if row >= start))
        with ThreadPoolExecutor(WINDOWS_AHEAD, thread_name_prefix="ranges") as threads:
            pending = deque(
                (window, threads.submit(self.read_window, window))
                for window in itertools.islice(windows, WINDOWS_AHEAD)
            )
            try:
                while pending:
                    window, files = pending.popleft()
                    yield from zip(window, files.result(), strict=True)
                    pending.extend(
                        (window, threads.submit(self.read_window, window)) for window in itertools.islice(windows, 1)
                    )
            finally:
                threads.shutdown(cancel_futures=True)

    def _text(self, row: int) -> bytes:
        start = int(self.rows["text_end"][row - 1]) if row else 0
        return self._texts[start : int(self.rows["text_end"][row])].tobytes()

    def _checksum(self, first: int, stop: int) -> str:
        """Return the checksum of some rows: of their bytes, and then of their texts."""
        if first == stop:
            return rows_checksum(b"", b"")
        start = int(self.rows["text_end"][first - 1]) if first else 0
        texts = self._texts[start : int(self.rows["text_end"][stop - 1])]
        return rows_checksum(self.rows[first:stop].tobytes(), texts.tobytes())

    def _check_unchanged(self, tar: SourceTar) -> None:
        """Raise `ShardChanged` if a tar has another size, or another tag of its server, than when it was indexed."""
        name, now = without_secrets(tar.url), describe_url(tar.url)
        remedy = "restore it, or index it again with another data.version"
        if now.size != tar.size:
            raise ShardChanged(f"{name} has {now.size} bytes, and had {tar.size} when it was indexed; {remedy}")
        if now.etag != tar.etag:
            raise ShardChanged(f"{name} has the tag {now.etag!r}, and had {tar.etag!r} when it was indexed; {remedy}")

    @property
    def is_local(self) -> bool:
        """Return whether all tars are files of a disk."""
        return all(is_local(tar.url) for tar in self.tars)

    def sizes(self, rows: range) -> Int64[np.ndarray, " row"]:
        """Return the bytes of the image files of consecutive rows."""
        lengths: Int64[np.ndarray, " row"] = self.rows["length"][rows.start : rows.stop]
        return lengths


def rows_checksum(rows: bytes, texts: bytes) -> str:
    """Return the SHA-256 of the rows of one tar and their texts."""
    return hashlib.sha256(rows + texts).hexdigest()


def _map(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    """Map a file of records; raises `ShardError` if it is missing or has a part of one."""
    try:
        size = path.stat().st_size
        return np.memmap(path, dtype, "r") if size else np.zeros(0, dtype)
    except (OSError, ValueError) as error:
        raise ShardError(f"{path} is not an offset index ({error}); run the stage that wrote it again") from error
