"""Errors of a storage, and how a driver's error becomes one of them.

OrchestratorError
└── StorageError             the storage refuses or is not usable; a retry does not help
    ├── StorageUnreachable   no response: its content is unknown, and a retry is safe
    └── CorruptTransfer      its content differs from what was uploaded; uploading again repairs it
"""

import contextlib
import errno
from collections.abc import Iterator

from orchestrator.errors import OrchestratorError

ErrorTypes = tuple[type[Exception], ...]

UNREACHABLE_ERRNOS = {
    errno.EBUSY,
    errno.EREMOTEIO,
    errno.ESTALE,
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
    errno.EHOSTDOWN,
    errno.ENOTCONN,
}
"""Errors of network file systems, and the numbers that S3's driver assigns to 409, 500 and 503."""

REMEDIES = {
    errno.ENOSPC: ("the disk is full", "free space there; files that were complete are unchanged"),
    errno.EDQUOT: ("the quota is used up", "free space there; files that were complete are unchanged"),
    errno.EROFS: ("the file system is read-only", "mount it for writing, or name another storage"),
}
"""Cause and remedy by error number."""


class StorageError(OrchestratorError):
    """A storage refuses or is not usable; a retry does not help."""


class StorageUnreachable(StorageError):
    """A storage does not respond, so its content is unknown; a retry is safe."""


class CorruptTransfer(StorageError):
    """The content of a storage differs from what was uploaded."""


@contextlib.contextmanager
def explain_storage_error(action: str, refusal_errors: ErrorTypes, unreachable_errors: ErrorTypes) -> Iterator[None]:
    """Convert errors of the system and of a driver to `StorageError`; messages begin with `action`.

    `refusal_errors` and `unreachable_errors` are a driver's errors besides `OSError` for a refusal and for no response.
    """
    try:
        yield
    except (OSError, *refusal_errors, *unreachable_errors) as error:
        raise _convert_error(error, action, unreachable_errors) from error


def _convert_error(error: Exception, action: str, unreachable_errors: ErrorTypes) -> StorageError:
    number = getattr(error, "errno", None)
    text = f"{type(error).__name__}: {error}"
    if number in UNREACHABLE_ERRNOS or isinstance(error, (TimeoutError, ConnectionError, *unreachable_errors)):
        return StorageUnreachable(f"{action}: no response ({text}); check address and network; a retry is safe")
    if number in REMEDIES:
        cause, remedy = REMEDIES[number]
        return StorageError(f"{action}: {cause} ({text}); {remedy}")
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        return StorageError(
            f"{action}: access is refused ({text}); check the credentials in the environment of this process, its "
            "clock, and its rights there"
        )
    if isinstance(error, FileNotFoundError):
        return StorageError(f"{action}: {text}; create the bucket or the folder, or correct the URL")
    return StorageError(f"{action}: {text}; check that the storage is of the kind that its URL names")
