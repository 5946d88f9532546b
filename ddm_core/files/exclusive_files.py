"""Files that only one of several processes creates, on any file system."""

import errno
import os
from pathlib import Path

NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
"""Errors of a file system without hard links, such as a mounted bucket."""


def create_file(path: Path, content: bytes, *, mode: int) -> None:
    """Create a file and flush it to the disk; raises `FileExistsError` if there is one already, or a link."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        if os.write(descriptor, content) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def create_once(path: Path, content: bytes, candidate: Path, *, mode: int = 0o644) -> bool:
    """Create a file unless it exists; return whether this process has, as exactly one of several does.

    `candidate` is a name of this process alone, in the same folder. By a hard link of it the file appears with its
    content. Without hard links it is created exclusively, and for an instant a reader may see it empty.
    """
    candidate.unlink(missing_ok=True)
    try:
        create_file(candidate, content, mode=mode)
        return _create_if_absent(path, content, candidate, mode)
    finally:
        candidate.unlink(missing_ok=True)


def _create_if_absent(path: Path, content: bytes, candidate: Path, mode: int) -> bool:
    try:
        os.link(candidate, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
    else:
        return True
    try:
        create_file(path, content, mode=mode)
    except FileExistsError:
        return False
    return True
