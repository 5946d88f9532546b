"""What the operating system refuses a stage, in words: which place, how much is free, what to do."""

import contextlib
import errno
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from orchestrator.errors import RunFolderError

MADE_ROOM = (
    "make room there, or move the run folder to a larger disk; what was finished is kept, go on with `ddm resume`"
)

REFUSALS = {
    errno.ENOSPC: ("DiskFull", MADE_ROOM),
    errno.EDQUOT: ("DiskFull", MADE_ROOM),
    errno.EROFS: ("ReadOnlyDisk", "mount it writable, or move the run folder; what was finished is kept"),
    errno.EMFILE: ("TooManyOpenFiles", "raise the limit (`ulimit -n`), or run fewer stages at once"),
    errno.ENFILE: ("TooManyOpenFiles", "close other programs of this machine, or run fewer stages at once"),
}
"""A name and a way out, by the system's number."""

NUMPYS_WORDS = re.compile(r"\d+ requested and \d+ written$|Not enough free space to write ")


def error_number(error: BaseException) -> int | None:
    """The system's number of an error, if it is one; safetensors and numpy tell it in words alone."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        return int(found[1])
    return errno.ENOSPC if isinstance(error, OSError) and NUMPYS_WORDS.match(str(error)) else None


def explain_disk_error(error: BaseException, place: Path) -> str:
    """Name and text of an error; if the disk at `place` is the reason, with what is free there and the way out."""
    refusal = REFUSALS.get(error_number(error) or 0)
    if refusal is None:
        return f"{type(error).__name__}: {error}"
    name, way_out = refusal
    standing = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
    free_mb = shutil.disk_usage(standing).free / 1e6
    return f"{name}: {error}; {place} has {free_mb:.1f} MB free now; {way_out}"


@contextlib.contextmanager
def disk_errors_as_messages(place: Path) -> Iterator[None]:
    """Turn what the disk at `place` refuses while the block lasts into a `RunFolderError`."""
    try:
        yield
    except OSError as error:
        if error_number(error) not in REFUSALS:
            raise
        raise RunFolderError(explain_disk_error(error, place)) from error
