"""Checksums of files, computed once for each time that a file is written."""

import functools
import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path

SETTLED_NS = 2 * 10**9
"""Age from which a file's time of writing tells one writing from the next, on every file system."""


@dataclass(frozen=True, slots=True)
class _FileState:
    """A file as it was last written; hard links of it are equal."""

    path: Path = field(compare=False)
    device: int
    inode: int
    size: int
    written_ns: int


def checksum(path: Path) -> str:
    """Return the SHA-256 of one file, as 64 hex digits.

    This process reads a file again only after it was written again, by its time of writing; one that was written in the
    last two seconds is always read.
    """
    status = path.stat()
    state = _FileState(path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    is_settled = time.time_ns() - state.written_ns > SETTLED_NS
    return digest_once(state) if is_settled else _digest(state)


def _digest(state: _FileState) -> str:
    with state.path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


digest_once = functools.lru_cache(maxsize=2**16)(_digest)
"""`_digest` with a memory of the process; `cache_clear` empties it."""
