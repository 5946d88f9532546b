"""What a folder holds at one instant, although somebody may be working in it.

Files that have to be sent are opened, so that they can be sent even after they were renamed or deleted. What the floor
is in the middle of writing (`.name.pid`, see `artifacts.py`) is left out.
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
from orchestrator.islands.storage.index import Entry, Index, checked_path
from orchestrator.islands.storage.object_store import hash_stream

TRIES = 10
PAUSE_S = 0.05

OPEN_FILES = 100
"""So many files are open at most; a folder with more that are new is sent in several rounds."""

SETTLED_S = 2.0
"""A file that was written less long ago may change again without another size or time, so it is read again."""

IN_WORK = re.compile(r"\..+\.\d+")


class Checksums:
    """SHA-256 of local files, read again only when size, time or inode has changed."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[int, int, int], Entry]] = {}

    def known(self, path: Path, state: os.stat_result) -> Entry | None:
        """What the file holds, if that is known without reading it."""
        stamp, entry = self._known.get(str(path), (None, None))
        return entry if stamp == (state.st_ino, state.st_size, state.st_mtime_ns) else None

    def read(self, path: Path, file: BinaryIO) -> Entry:
        """What an open file holds now."""
        state = os.fstat(file.fileno())
        entry = hash_stream(file, state.st_size)
        if time.time() - state.st_mtime > SETTLED_S:
            self._known[str(path)] = (state.st_ino, state.st_size, state.st_mtime_ns), entry
        return entry

    def of(self, path: Path) -> Entry | None:
        """What a file holds; None if there is none."""
        try:
            return self.known(path, path.stat()) or self._reread(path)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def _reread(self, path: Path) -> Entry:
        with path.open("rb") as file:
            return self.read(path, file)


@dataclass(slots=True)
class FolderSnapshot:
    """A folder at one instant."""

    index: Index = field(default_factory=dict)
    opened: dict[Entry, BinaryIO] = field(default_factory=dict)
    """Files that are not there yet."""
    whole: bool = True
    """Whether the index is complete; it is not if too many files had to be opened."""


@contextlib.contextmanager
def snapshot(
    folder: Path, skip: tuple[str, ...], checksums: Checksums, there: Mapping[str, int]
) -> Iterator[FolderSnapshot]:
    """Yield what `folder` holds, with the files open whose checksum and size are not `there`.

    Raises `StorageError` if there is no such folder, or if it does not hold still.
    """
    for _ in range(TRIES):
        with contextlib.ExitStack() as stack:
            files = files_of(folder, skip)
            taken = _take(folder, files, checksums, there, stack)
            if taken and (not taken.whole or files_of(folder, skip) == files):
                yield taken
                return
        time.sleep(PAUSE_S)
    raise StorageError(f"{folder} has changed {TRIES} times while it was read; send it when nobody writes there")


def files_of(folder: Path, skip: tuple[str, ...] = ()) -> dict[str, int]:
    """Inode of every file below a folder, by relative path; `skip` names what is left out at the top.

    Raises `StorageError` for a link: what it names may lie anywhere.
    """
    if not folder.is_dir():
        raise StorageError(f"{folder} is no folder; nothing was sent, and what the storage has is untouched")
    found: dict[str, int] = {}
    for parent, folders, names in os.walk(folder, onerror=_raise_unless_gone):
        left_out = set(skip) if Path(parent) == folder else set()
        folders[:] = [name for name in folders if name not in left_out and not IN_WORK.fullmatch(name)]
        for name in (*folders, *names):
            if name in left_out or IN_WORK.fullmatch(name):
                continue
            path = Path(parent, name)
            with contextlib.suppress(FileNotFoundError):
                state = path.lstat()
                if stat.S_ISLNK(state.st_mode):
                    raise StorageError(f"{path} is a link, and only files are sent; put what it names in its place")
                if stat.S_ISREG(state.st_mode):
                    found[path.relative_to(folder).as_posix()] = state.st_ino
    return found


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _take(
    folder: Path, files: Mapping[str, int], checksums: Checksums, there: Mapping[str, int], stack: contextlib.ExitStack
) -> FolderSnapshot | None:
    """One look at the files; None if one of them is gone already."""
    taken = FolderSnapshot()
    for name, inode in files.items():
        path = folder / checked_path(name)
        try:
            entry = checksums.known(path, path.stat())
            if entry is None or there.get(entry.sha256) != entry.bytes:
                if len(taken.opened) == OPEN_FILES:
                    taken.whole = False
                    return taken
                entry = _open(path, inode, checksums, there, taken, stack)
        except FileNotFoundError:
            return None
        taken.index[name] = entry
    return taken


def _open(
    path: Path,
    inode: int,
    checksums: Checksums,
    there: Mapping[str, int],
    taken: FolderSnapshot,
    stack: contextlib.ExitStack,
) -> Entry:
    """Read a file, and keep it open if it has to be sent."""
    with contextlib.ExitStack() as own:
        file = own.enter_context(path.open("rb"))
        if os.fstat(file.fileno()).st_ino != inode:
            raise FileNotFoundError(f"{path} was replaced")
        entry = checksums.read(path, file)
        if there.get(entry.sha256) != entry.bytes and entry not in taken.opened:
            taken.opened[entry] = file
            stack.push(own.pop_all())
    return entry
