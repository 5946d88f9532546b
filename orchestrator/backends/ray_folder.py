"""A private folder for the temporary files of one embedded Ray cluster.

Ray gives its own folders mode 777, so they are inside a folder of mode 700. The owner holds the kernel's lock on that
folder, which ends with the owner, however it ends. So a folder of our form and our user without a lock is left from a
dead run: it is deleted together with the processes of that run.
"""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from orchestrator.errors import OrchestratorError
from orchestrator.run.marked_processes import kill_marked_processes

MAX_FOLDER_BYTES = 38
"""Longest path of the private folder, so that the paths of Ray's sockets stay below the kernel's limit of 107 bytes."""

SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - private folders of mode 700 are created in them
"""Parents of private folders where the system's own temporary folder has a long path, such as a job's TMPDIR."""


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """Create a folder of mode 700 for this process; at the end, kill the processes marked with it and delete it."""
    parent = short_temporary_folder()
    remove_abandoned(parent)
    folder, lock = _create_locked(parent)
    try:
        yield folder
    finally:
        try:
            _remove(folder)
        finally:
            os.close(lock)


def short_temporary_folder() -> Path:
    """Return a folder for temporary files whose path is short enough for Ray's sockets below it.

    Raises `OrchestratorError` if there is none.
    """
    candidates = [Path(tempfile.gettempdir()), *map(Path, SHORT_FOLDERS)]
    longest = MAX_FOLDER_BYTES - len(_new_name()) - 1
    for parent in candidates:
        if len(os.fsencode(parent)) <= longest and parent.is_dir() and os.access(parent, os.W_OK | os.X_OK):
            return parent
    raise OrchestratorError(
        f"Ray needs a folder for temporary files that can be written and whose path has at most {longest} bytes; got "
        f"{', '.join(map(str, candidates))}: set TMPDIR to such a folder"
    )


def remove_abandoned(parent: Path) -> None:
    """Delete the private folders of this user whose owners are dead; nothing else, and no link is followed."""
    form = re.compile(rf"ddm-ray-{os.getuid()}-[0-9a-f]{{8}}")
    for entry in os.scandir(parent):
        if form.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            lock = _lock(Path(entry.path), wait=False)
            if lock is not None:
                _remove(Path(entry.path))
                os.close(lock)


def _new_name() -> str:
    return f"ddm-ray-{os.getuid()}-{secrets.token_hex(4)}"


def _create_locked(parent: Path) -> tuple[Path, int]:
    """Create a folder; return it and its lock. Another process may take it for abandoned before it is locked."""
    while True:
        folder = parent / _new_name()
        folder.mkdir(mode=0o700)
        lock = _lock(folder, wait=True)
        if lock is not None:
            return folder, lock


def _lock(folder: Path, *, wait: bool) -> int | None:
    """Lock a folder and return the descriptor; None if it is in use, not private to this user, or deleted."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    status = os.fstat(lock)
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        is_private = status.st_uid == os.getuid() and stat.S_IMODE(status.st_mode) == 0o700
        if is_private and os.path.samestat(status, os.stat(folder, follow_symlinks=False)):
            return lock
    os.close(lock)
    return None


def _remove(folder: Path) -> None:
    kill_marked_processes(str(folder))
    shutil.rmtree(folder, ignore_errors=True)
