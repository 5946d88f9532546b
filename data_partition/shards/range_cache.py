"""A bounded folder of parts of tars, read ahead of their use: the images of one tar that an offset index names.

A part appears by a rename, so it is whole or absent; the least recently used goes first. Deleting the folder at any
time costs time only: what is not there is read again, and every image is compared with its hash.
"""

import contextlib
import logging
import os
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np
from jaxtyping import Int64

from data_partition.errors import CacheFull
from data_partition.shards.offset_index import OffsetIndex

log = logging.getLogger(__name__)

THREADS = 4
"""Parts that are read at the same time."""

PARTIAL = ".partial-"


class RangeCache:
    """Parts in one folder, which no other process uses."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Keep what an earlier process has finished, and delete what it has not."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.max_bytes = folder, max_bytes
        self._kept: OrderedDict[str, int] = OrderedDict()
        """Bytes of the parts that are there, the least recently used first."""
        self._coming: dict[str, Future[None]] = {}
        self._coming_bytes = 0
        self._starts: dict[str, Int64[np.ndarray, " row"]] = {}
        """Where the image of every row of a part begins, of those that were read."""
        self._done: Future[None] = Future()
        self._done.set_result(None)
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="fetch")
        for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
            if path.name.startswith(PARTIAL):
                path.unlink()
            else:
                self._kept[path.name] = path.stat().st_size
        self._make_room(0)

    def __enter__(self) -> "RangeCache":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(cancel_futures=True)

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all parts, those that are coming included."""
        return sum(self._kept.values()) + self._coming_bytes

    def fetch(self, index: OffsetIndex, tar: int) -> Future[None]:
        """Have the part of a tar read, unless it is there; the result says when it is, or why it is not."""
        name = _name(index, tar)
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
                return self._done
            if name not in self._coming:
                size = int(index.sizes(index.rows_of(tar)).sum())
                self._make_room(size)
                self._coming_bytes += size
                self._coming[name] = self._threads.submit(self._store, index, tar, name, size)
            return self._coming[name]

    def read(self, index: OffsetIndex, row: int) -> bytes:
        """Return the image file of a row, after its part is there; raises `CacheFull`, or like `OffsetIndex.read`."""
        tar = index.tar_of(row)
        self.fetch(index, tar).result()
        name, first = _name(index, tar), int(index.ends[tar])
        starts = self._starts.get(name)
        if starts is None:
            starts = self._starts[name] = np.cumsum([0, *index.sizes(range(first, int(index.ends[tar + 1])))])
        with contextlib.suppress(OSError):
            data = _read_part(self.folder / name, int(starts[row - first]), int(starts[row - first + 1]))
            if index.is_intact(row, data):
                return data
        return index.read(row)

    def _store(self, index: OffsetIndex, tar: int, name: str, size: int) -> None:
        partial = self.folder / f"{PARTIAL}{name}"
        try:
            with partial.open("wb") as file:
                for window in index.windows(index.rows_of(tar)):
                    file.writelines(index.read_window(window))
            partial.replace(self.folder / name)
        except OSError as error:
            raise CacheFull(
                f"the cache in {self.folder} cannot be written ({error.strerror}); free some space, or lower "
                "training.cache_gb, and continue with `ddm resume`"
            ) from error
        finally:
            partial.unlink(missing_ok=True)
            with self._lock:
                self._coming_bytes -= size
                del self._coming[name]
                if (self.folder / name).exists():
                    self._kept[name] = size

    def _make_room(self, size: int) -> None:
        """Delete the least recently used parts until there is room for so many bytes."""
        while self._kept and self.num_bytes + size > self.max_bytes:
            name, _ = self._kept.popitem(last=False)
            self._starts.pop(name, None)
            (self.folder / name).unlink(missing_ok=True)


def _read_part(path: Path, start: int, stop: int) -> bytes:
    """Return some bytes of a file, by three calls of the system; raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, stop - start, start)
    finally:
        os.close(descriptor)


def _name(index: OffsetIndex, tar: int) -> str:
    """Return a name that only the same images of the same tar have."""
    return index.checksums[tar][:32]
