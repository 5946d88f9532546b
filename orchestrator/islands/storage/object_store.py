"""Single objects in a storage, by key: what folders and JSON files are made of."""

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

from orchestrator.islands.storage.errors import ErrorTypes
from orchestrator.islands.storage.index import Entry

THREADS = 4
CHUNK = 1 << 20

Item = TypeVar("Item")
Result = TypeVar("Result")


class ObjectStore(Protocol):
    """Bytes by key; a reader sees an object whole or not at all."""

    refusals: ErrorTypes
    """What its driver raises beside OSError when it is refused,"""
    silences: ErrorTypes
    """and when nobody answers."""

    def read(self, key: str) -> bytes | None:
        """A small object; None if there is none."""

    def write(self, key: str, data: bytes) -> None:
        """Write a small object over whatever was there."""

    def create(self, key: str, data: bytes) -> bool:
        """Write a small object unless there is one, and say whether it was written."""

    def send(self, key: str, file: BinaryIO, entry: Entry) -> bool:
        """Write what `file` holds; False, and nothing written, if that is not what the entry says any more."""

    def fetch(self, key: str, target: Path) -> None:
        """Copy an object into a new file; raises FileNotFoundError."""

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of every object directly in a folder, by the last part of its key."""

    def below(self, key: str) -> list[str]:
        """Keys of all objects in a folder, however deep, or of the one that is called so."""

    def remove(self, key: str) -> None:
        """Delete an object; one that is not there is fine."""


def hash_stream(file: BinaryIO, size: int, sink: Callable[[bytes], object] = len) -> Entry:
    """Read the first `size` bytes of a file, hand them on, and say what they were; fewer if the file is shorter."""
    digest, done = hashlib.sha256(), 0
    file.seek(0)
    while chunk := file.read(min(CHUNK, size - done)):
        digest.update(chunk)
        sink(chunk)
        done += len(chunk)
    return Entry(digest.hexdigest(), done)


def map_parallel(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Call a function for every item on a few threads; after the first error no further call begins."""
    with ThreadPoolExecutor(THREADS) as pool:
        calls = [pool.submit(function, item) for item in items]
        try:
            return [call.result() for call in calls]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
