"""Single objects in a storage, by key: what folders and JSON files are made of."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar
from urllib.parse import urlsplit

from orchestrator.islands.storage_errors import ErrorTypes, StorageError
from orchestrator.islands.tree_index import Entry

THREADS = 4
CHUNK = 1 << 20

Item = TypeVar("Item")
Result = TypeVar("Result")


class Objects(Protocol):
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


def split_url(url: str) -> tuple[str, str]:
    """Scheme and path of a storage's URL; raises `StorageError` for all but the schemes on the list."""
    if url.startswith("/") and "::" not in url:
        return "file", url.rstrip("/") or "/"
    parts = urlsplit(url)
    path = f"{parts.netloc}{parts.path}".rstrip("/")
    strange = set("@?#*[]\\") & set(url) or "::" in url or {"..", "."} & set(path.split("/"))
    if parts.scheme not in ("file", "s3", "gs", "gcs", "memory") or not path or strange:
        raise StorageError(
            f"a storage is an absolute folder or a plain URL that starts with file:, s3:, gs: or memory:, not {url!r}; "
            "credentials belong into the environment"
        )
    if parts.scheme == "file" and (parts.netloc or not parts.path.startswith("/")):
        raise StorageError(f"a local folder is written file:///absolute/path, not {url!r}")
    return parts.scheme.replace("gcs", "gs"), path


def open_objects(url: str, options: Mapping[str, str]) -> Objects:
    """The objects below a URL; raises `StorageError` for a URL, an option or a driver that cannot be used."""
    from orchestrator.islands.local_objects import LocalObjects
    from orchestrator.islands.remote_objects import RemoteObjects

    scheme, path = split_url(url)
    if scheme != "file":
        return RemoteObjects(scheme, path, options)
    if options:
        raise StorageError(f"a local folder has no options, not {', '.join(options)}; remove storage_options of {url}")
    return LocalObjects(Path(path))


def hashed(file: BinaryIO, size: int, sink: Callable[[bytes], object] = len) -> Entry:
    """Read the first `size` bytes of a file, hand them on, and say what they were; fewer if the file is shorter."""
    digest, done = hashlib.sha256(), 0
    file.seek(0)
    while chunk := file.read(min(CHUNK, size - done)):
        digest.update(chunk)
        sink(chunk)
        done += len(chunk)
    return Entry(digest.hexdigest(), done)


def in_parallel(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Call a function for every item on a few threads; after the first error no further call begins."""
    with ThreadPoolExecutor(THREADS) as pool:
        calls = [pool.submit(function, item) for item in items]
        try:
            return [call.result() for call in calls]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
