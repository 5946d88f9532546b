"""Proof that a process is the worker of an attempt: it holds a lock on a file in the attempt's folder.

A run folder may come from anyone, so a process id in it proves nothing: the id may be that of any process of this user.
The kernel's table of locks tells which process holds the lock, and only a process that has opened the file can hold it.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

LOCK_TABLE = Path("/proc/locks")


@contextlib.contextmanager
def hold_worker_lock(attempt: Path) -> Iterator[None]:
    """Hold the lock of an attempt while the block lasts; it ends with the process, however that ends."""
    descriptor = os.open(_lock_file(attempt), os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with contextlib.suppress(OSError):  # without locks here, the worker is never killed, only fenced
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def is_worker(pid: int, attempt: Path) -> bool:
    """Return whether a process on this machine holds the lock of an attempt."""
    try:
        status = os.stat(_lock_file(attempt), follow_symlinks=False)
        table = LOCK_TABLE.read_text(encoding="ascii")
    except OSError:
        return False
    # `1: FLOCK  ADVISORY  WRITE 4711 08:01:131090 0 EOF`
    locks = [line.split() for line in table.splitlines()]
    return any(
        fields[1] == "FLOCK" and fields[4] == str(pid) and fields[5].rpartition(":")[2] == str(status.st_ino)
        for fields in locks
        if len(fields) > 5
    )


def _lock_file(attempt: Path) -> Path:
    return attempt / "worker.lock"
