"""Consistent snapshots of a folder in which another process may write.

Files to upload are opened, so they can be uploaded even after they were renamed or deleted. Files that
`ddm_core.artifacts` is still writing (`.name.pid`) are skipped.
"""

import contextlib
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from orchestrator.islands.storage.errors import StorageError
from orchestrator.islands.storage.index import Entry, Index, validate_path
from orchestrator.islands.storage.object_store import hash_stream

TRIES = 10
PAUSE_S = 0.05

OPEN_FILES = 100
"""Maximum number of open files; a folder with more new files is uploaded in several rounds."""

SETTLE_S = 2.0
"""A file that was written less long ago may change again at equal size and time, so it is read again."""

UNFINISHED_NAME = re.compile(r"\..+\.\d+")


class Checksums:
    """SHA-256 of local files, read again only when size, time or inode has changed."""

    def __init__(self) -> None:
        self._cache: dict[str, tuple[tuple[int, int, int], Entry]] = {}

    def lookup(self, path: Path, status: os.stat_result) -> Entry | None:
        """Return the cached entry of a file; None if there is none or the file has changed."""
        stamp, entry = self._cache.get(str(path), (None, None))
        return entry if stamp == (status.st_ino, status.st_size, status.st_mtime_ns) else None

    def compute(self, path: Path, file: BinaryIO) -> Entry:
        """Read an open file and return its entry."""
        status = os.fstat(file.fileno())
        entry = hash_stream(file, status.st_size)
        if time.time() - status.st_mtime > SETTLE_S:
            self._cache[str(path)] = (status.st_ino, status.st_size, status.st_mtime_ns), entry
        return entry

    def get(self, path: Path) -> Entry | None:
        """Return a file's entry; None if there is no such file."""
        try:
            return self.lookup(path, path.stat()) or self._read(path)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def _read(self, path: Path) -> Entry:
        with path.open("rb") as file:
            return self.compute(path, file)


@dataclass(slots=True)
class FolderSnapshot:
    """A folder at one instant."""

    index: Index = field(default_factory=dict)
    open_files: dict[Entry, BinaryIO] = field(default_factory=dict)
    """Files whose content is not in the storage yet."""
    is_complete: bool = True
    """Whether the index has all files; it has not if there are more than `OPEN_FILES` to upload."""


@contextlib.contextmanager
def snapshot(
    folder: Path, skip: tuple[str, ...], checksums: Checksums, remote_sizes: Mapping[str, int]
) -> Iterator[FolderSnapshot]:
    """Yield a snapshot of `folder`, with the files open whose checksum and size are not in `remote_sizes`.

    Raises `StorageError` if there is no such folder, or if it changes during each of `TRIES` tries.
    """
    for _ in range(TRIES):
        with contextlib.ExitStack() as stack:
            files = list_files(folder, skip)
            taken = _take_snapshot(folder, files, checksums, remote_sizes, stack)
            if taken and (not taken.is_complete or list_files(folder, skip) == files):
                yield taken
                return
        time.sleep(PAUSE_S)
    raise StorageError(f"{folder} has changed {TRIES} times while it was read; send it when nothing writes there")


def list_files(folder: Path, skip: tuple[str, ...] = ()) -> dict[str, int]:
    """Return the inode of every file below a folder, by relative path; `skip` has top-level names to leave out.

    Raises `StorageError` for a link, because its target may be anywhere.
    """
    if not folder.is_dir():
        raise StorageError(f"{folder} is no folder; nothing was sent, and the storage is unchanged")
    inodes: dict[str, int] = {}
    for parent, folders, names in os.walk(folder, onerror=_raise_unless_gone):
        skipped = set(skip) if Path(parent) == folder else set()
        folders[:] = [name for name in folders if name not in skipped and not UNFINISHED_NAME.fullmatch(name)]
        for name in (*folders, *names):
            if name in skipped or UNFINISHED_NAME.fullmatch(name):
                continue
            path = Path(parent, name)
            with contextlib.suppress(FileNotFoundError):
                status = path.lstat()
                if stat.S_ISLNK(status.st_mode):
                    raise StorageError(f"{path} is a link, and only files are sent; replace it by its target")
                if stat.S_ISREG(status.st_mode):
                    inodes[path.relative_to(folder).as_posix()] = status.st_ino
    return inodes


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _take_snapshot(
    folder: Path,
    files: Mapping[str, int],
    checksums: Checksums,
    remote_sizes: Mapping[str, int],
    stack: contextlib.ExitStack,
) -> FolderSnapshot | None:
    """Read the files once; return None if one of them is gone already."""
    taken = FolderSnapshot()
    for name, inode in files.items():
        path = folder / validate_path(name)
        try:
            entry = checksums.lookup(path, path.stat())
            if entry is None or remote_sizes.get(entry.sha256) != entry.bytes:
                if len(taken.open_files) == OPEN_FILES:
                    taken.is_complete = False
                    return taken
                entry = _open_file(path, inode, checksums, remote_sizes, taken, stack)
        except FileNotFoundError:
            return None
        taken.index[name] = entry
    return taken


def _open_file(
    path: Path,
    inode: int,
    checksums: Checksums,
    remote_sizes: Mapping[str, int],
    taken: FolderSnapshot,
    stack: contextlib.ExitStack,
) -> Entry:
    """Read a file; leave it open in `taken` if its content has to be uploaded."""
    with contextlib.ExitStack() as file_stack:
        file = file_stack.enter_context(path.open("rb"))
        if os.fstat(file.fileno()).st_ino != inode:
            raise FileNotFoundError(f"{path} was replaced")
        entry = checksums.compute(path, file)
        if remote_sizes.get(entry.sha256) != entry.bytes and entry not in taken.open_files:
            taken.open_files[entry] = file
            stack.push(file_stack.pop_all())
    return entry
