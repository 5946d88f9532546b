"""Objects in a local folder, or on a disk that several machines mount."""

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ddm_core.artifacts import sync
from ddm_core.files.exclusive_files import create_once
from orchestrator.islands.storage.errors import ErrorTypes
from orchestrator.islands.storage.index import Entry
from orchestrator.islands.storage.object_store import hash_stream

ABANDONED_S = 3600.0
"""A temporary file that is older was left by a killed process."""


class LocalStore:
    """Objects as files, each written under a temporary name, flushed and renamed."""

    refusal_errors: ErrorTypes = ()
    unreachable_errors: ErrorTypes = ()

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, key: str) -> bytes | None:
        """Read a small object; return None if there is none."""
        try:
            return (self.root / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, key: str, data: bytes) -> None:
        """Write a small object, replacing any present one."""
        path = self.root / key
        with _temporary_file(path) as temporary:
            temporary.write_bytes(data)
            _rename(temporary, path)

    def create(self, key: str, data: bytes) -> bool:
        """Write a small object if there is none."""
        path = self.root / key
        with _temporary_file(path) as temporary:
            is_new = create_once(path, data, temporary)
        if is_new:
            sync(path.parent)
        return is_new

    def upload(self, key: str, file: BinaryIO, entry: Entry) -> bool:
        """Write the content of `file`; write nothing and return False if it no longer matches the entry."""
        path = self.root / key
        with _temporary_file(path) as temporary:
            with temporary.open("wb") as copy:
                is_unchanged = hash_stream(file, entry.bytes, copy.write) == entry
            if is_unchanged:
                _rename(temporary, path)
            return is_unchanged

    def download(self, key: str, target: Path) -> None:
        """Copy an object into a new file; raise FileNotFoundError if there is none."""
        shutil.copyfile(self.root / key, target)

    def list_sizes(self, folder: str) -> dict[str, int]:
        """Return the bytes of every object directly in a folder, abandoned temporary files included."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.root / folder) as items:
            return {item.name: item.stat().st_size for item in items if item.is_file() and not _is_in_use(item)}
        return {}

    def list_keys(self, key: str) -> list[str]:
        """Return the keys of all objects below a folder, or `key` itself if it is an object."""
        path = self.root / key
        items = path.rglob("*") if path.is_dir() else [path]
        return [str(item.relative_to(self.root)) for item in items if item.is_file()]

    def delete(self, key: str) -> None:
        """Delete an object; an absent one is no error."""
        (self.root / key).unlink(missing_ok=True)


@contextlib.contextmanager
def _temporary_file(path: Path) -> Iterator[Path]:
    """Yield a unique file name in the folder of `path`; delete the file at the end if it still exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _rename(temporary: Path, path: Path) -> None:
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def _is_in_use(item: os.DirEntry[str]) -> bool:
    return item.name.endswith(".part") and time.time() - item.stat().st_mtime < ABANDONED_S
