"""Single objects in a storage, by key; trees and JSON files consist of them."""

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

from orchestrator.islands.storage.errors import ErrorTypes
from orchestrator.islands.storage.index import Entry

THREADS = 4
CHUNK_BYTES = 1 << 20

Item = TypeVar("Item")
Result = TypeVar("Result")


class ObjectStore(Protocol):
    """Bytes by key; writes are atomic, so a reader gets a complete object or none."""

    refusal_errors: ErrorTypes
    """Errors besides OSError that the driver raises when the storage refuses."""
    unreachable_errors: ErrorTypes
    """Errors besides OSError that the driver raises when there is no response."""

    def read(self, key: str) -> bytes | None:
        """Read a small object; return None if there is none."""

    def write(self, key: str, data: bytes) -> None:
        """Write a small object, replacing any present one."""

    def create(self, key: str, data: bytes) -> bool:
        """Write a small object if there is none; return whether it was written."""

    def upload(self, key: str, file: BinaryIO, entry: Entry) -> bool:
        """Write the content of `file`; write nothing and return False if it no longer matches the entry."""

    def download(self, key: str, target: Path) -> None:
        """Copy an object into a new file; raise FileNotFoundError if there is none."""

    def list_sizes(self, folder: str) -> dict[str, int]:
        """Return the bytes of every object directly in a folder, by the last part of its key."""

    def list_keys(self, key: str) -> list[str]:
        """Return the keys of all objects below a folder, or `key` itself if it is an object."""

    def delete(self, key: str) -> None:
        """Delete an object; an absent one is no error."""


def hash_stream(file: BinaryIO, size: int, sink: Callable[[bytes], object] = len) -> Entry:
    """Read the first `size` bytes of a file, pass them to `sink`, and return their checksum and number.

    The number is smaller than `size` if the file is shorter.
    """
    digest, bytes_read = hashlib.sha256(), 0
    file.seek(0)
    while chunk := file.read(min(CHUNK_BYTES, size - bytes_read)):
        digest.update(chunk)
        sink(chunk)
        bytes_read += len(chunk)
    return Entry(digest.hexdigest(), bytes_read)


def map_parallel(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Call a function for every item on a few threads; after the first error no further call starts."""
    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
