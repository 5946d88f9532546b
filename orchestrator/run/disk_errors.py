"""Disk errors as messages: which place, how much space is free, and the remedy."""

import contextlib
import errno
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from orchestrator.errors import RunFolderError

FREE_SPACE_REMEDY = (
    "free some space there, or move the run folder to a larger disk; finished stages are kept, "
    "continue with `ddm resume`"
)

DISK_ERRORS = {
    errno.ENOSPC: ("DiskFull", FREE_SPACE_REMEDY),
    errno.EDQUOT: ("DiskFull", FREE_SPACE_REMEDY),
    errno.EROFS: ("ReadOnlyDisk", "mount it writable, or move the run folder; finished stages are kept"),
    errno.EACCES: ("NoAccess", "give this user write access there, or use a copy of the run folder"),
    errno.EPERM: ("NoAccess", "give this user write access there, or use a copy of the run folder"),
    errno.EMFILE: ("TooManyOpenFiles", "raise the limit (`ulimit -n`), or run fewer stages at once"),
    errno.ENFILE: ("TooManyOpenFiles", "close other programs on this machine, or run fewer stages at once"),
}
"""Name and remedy by errno."""

DISK_FULL_MESSAGES = re.compile(r"\d+ requested and \d+ written$|Not enough free space to write ")


def error_number(error: BaseException) -> int | None:
    """Return an error's errno, or None; safetensors and numpy give it only in the message."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if match := re.search(r"\(os error (\d+)\)", str(error)):
        return int(match[1])
    return errno.ENOSPC if isinstance(error, OSError) and DISK_FULL_MESSAGES.match(str(error)) else None


def explain_disk_error(error: BaseException, place: Path) -> str:
    """Return an error's name and text; for an error of the disk at `place` also its free space and the remedy."""
    disk_error = DISK_ERRORS.get(error_number(error) or 0)
    if disk_error is None:
        return f"{type(error).__name__}: {error}"
    name, remedy = disk_error
    existing = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
    free_mb = shutil.disk_usage(existing).free / 1e6
    return f"{name}: {error}; {place} has {free_mb:.1f} MB free now; {remedy}"


@contextlib.contextmanager
def disk_errors_as_messages(place: Path) -> Iterator[None]:
    """Raise `RunFolderError` for the block's errors of the disk at `place`."""
    try:
        yield
    except OSError as error:
        if error_number(error) not in DISK_ERRORS:
            raise
        raise RunFolderError(explain_disk_error(error, place)) from error
