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
from orchestrator.islands.storage.errors import ErrorTypes
from orchestrator.islands.storage.index import Entry
from orchestrator.islands.storage.object_store import hash_stream

ABANDONED_S = 3600.0
"""A temporary file that is older was left by a killed process."""


class LocalStore:
    """Files that are written under another name, flushed and renamed."""

    refusals: ErrorTypes = ()
    silences: ErrorTypes = ()

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, key: str) -> bytes | None:
        """A small object; None if there is none."""
        try:
            return (self.root / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, key: str, data: bytes) -> None:
        """Write a small object over whatever was there."""
        path = self.root / key
        with _temporary(path) as temporary:
            temporary.write_bytes(data)
            _rename(temporary, path)

    def create(self, key: str, data: bytes) -> bool:
        """Write a small object unless there is one: a link can be made by one process only."""
        path = self.root / key
        with _temporary(path) as temporary:
            temporary.write_bytes(data)
            sync(temporary)
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            sync(path.parent)
            return True

    def send(self, key: str, file: BinaryIO, entry: Entry) -> bool:
        """Write what `file` holds; False, and nothing written, if that is not what the entry says any more."""
        path = self.root / key
        with _temporary(path) as temporary:
            with temporary.open("wb") as copy:
                same = hash_stream(file, entry.bytes, copy.write) == entry
            if same:
                _rename(temporary, path)
            return same

    def fetch(self, key: str, target: Path) -> None:
        """Copy an object into a new file; raises FileNotFoundError."""
        shutil.copyfile(self.root / key, target)

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of every object directly in a folder; among them what a killed process left long ago."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.root / folder) as found:
            return {item.name: item.stat().st_size for item in found if item.is_file() and not _is_in_work(item)}
        return {}

    def below(self, key: str) -> list[str]:
        """Keys of all objects in a folder, however deep, or of the one that is called so."""
        path = self.root / key
        found = path.rglob("*") if path.is_dir() else [path]
        return [str(item.relative_to(self.root)) for item in found if item.is_file()]

    def remove(self, key: str) -> None:
        """Delete an object; one that is not there is fine."""
        (self.root / key).unlink(missing_ok=True)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A name beside `path` that nobody else uses; what is left there at the end goes."""
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


def _is_in_work(item: os.DirEntry[str]) -> bool:
    return item.name.endswith(".part") and time.time() - item.stat().st_mtime < ABANDONED_S
