"""Pictures of data sets and clusters, decoded from the shards when they are looked at, and kept for a while."""

import threading
from collections import OrderedDict
from itertools import islice
from pathlib import Path

from PIL import Image

from data_partition.shards.images import encode_png, to_image, to_pixels
from data_partition.shards.shards import decode_sample, read_encoded, read_index
from orchestrator.errors import RunFolderError

WALL = 48
"""Pictures that are shown of a cluster."""

MAX_READ = 2048
"""Samples of a cluster among which the shown ones are spread evenly."""

MAX_SIDE = 192
"""Pixels; larger pictures are scaled down."""

MAX_KEPT_BYTES = 2**26
"""Bytes of the pictures in memory, of all runs."""

Key = tuple[str, int, int]
"""Folder of shards, its time of change (ns), and a sample, -1 for the wall of a cluster."""


class PictureCache:
    """PNG files by folder of shards; the least recently used are dropped first."""

    def __init__(self, max_bytes: int = MAX_KEPT_BYTES) -> None:
        self.max_bytes = max_bytes
        self._kept: OrderedDict[Key, list[bytes]] = OrderedDict()
        self._lock = threading.Lock()
        """Held while shards are read: many requests for one wall must not read them many times."""

    def wall(self, shards: Path, number: int) -> bytes:
        """Return one of the pictures of a cluster; raises `RunFolderError` if it has not so many."""
        pictures = self._get(shards, -1)
        if not 0 <= number < len(pictures):
            raise RunFolderError(f"the wall of a cluster has {len(pictures)} pictures; number {number} does not exist")
        return pictures[number]

    def sample(self, shards: Path, row: int) -> bytes:
        """Return the picture of one sample; raises `RunFolderError` if there are not so many."""
        if not 0 <= row < read_index(shards).count:
            raise RunFolderError(f"{shards} has no sample {row}")
        return self._get(shards, row)[0]

    @property
    def kept_bytes(self) -> int:
        """Return the bytes of all pictures in memory."""
        return sum(len(picture) for pictures in self._kept.values() for picture in pictures)

    def _get(self, shards: Path, row: int) -> list[bytes]:
        key = str(shards), (shards / "index.json").stat().st_mtime_ns, row
        with self._lock:
            pictures = self._kept.pop(key, None)
            if pictures is None:
                pictures = read_wall(shards) if row < 0 else _encode(shards, row, row + 1, 1)
                self._drop_beyond(sum(map(len, pictures)))
            self._kept[key] = pictures
            return pictures

    def _drop_beyond(self, added: int) -> None:
        """Drop the least recently used pictures until `added` bytes have room."""
        room = self.max_bytes - added - self.kept_bytes
        while room < 0 and self._kept:
            _, dropped = self._kept.popitem(last=False)
            room += sum(map(len, dropped))


def wall_size(count: int) -> int:
    """Return how many pictures are shown of a cluster with so many samples."""
    return min(WALL, count)


def read_wall(shards: Path) -> list[bytes]:
    """Return pictures of a cluster, evenly spread over its first samples."""
    count = min(read_index(shards).count, MAX_READ)
    return _encode(shards, 0, count, max(1, count // WALL))[:WALL]


def _encode(shards: Path, start: int, stop: int, step: int) -> list[bytes]:
    chosen = islice(read_encoded(shards, start), 0, stop - start, step)
    images = [to_image(decode_sample(encoded, str(shards)).image) for encoded in chosen]
    for image in images:
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return [encode_png(to_pixels(image)) for image in images]
