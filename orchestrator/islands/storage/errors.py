"""What can go wrong between us and a storage, and how a driver's error becomes one of ours.

OrchestratorError
└── StorageError             the storage refuses, or is not what it should be; trying again does not help
    ├── StorageUnreachable   no answer: nothing is known about what lies there, and trying again is safe
    └── CorruptTransfer      what lies there is not what was sent; sending it again mends it
"""

import contextlib
import errno
from collections.abc import Iterator

from orchestrator.errors import OrchestratorError

ErrorTypes = tuple[type[Exception], ...]

SILENCES = {
    errno.EBUSY,
    errno.EREMOTEIO,
    errno.ESTALE,
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
    errno.EHOSTDOWN,
    errno.ENOTCONN,
}
"""Errors of network file systems, and the names that S3's driver gives to 409, 500 and 503."""

REMEDIES = {
    errno.ENOSPC: ("the disk is full", "free space there; what was whole before still is"),
    errno.EDQUOT: ("the quota is used up", "free space there; what was whole before still is"),
    errno.EROFS: ("the place is read-only", "mount it for writing, or name another storage"),
}


class StorageError(OrchestratorError):
    """A storage refuses, or is not what it should be; trying again does not help."""


class StorageUnreachable(StorageError):
    """A storage does not answer, which says nothing about what lies there; trying again is safe."""


class CorruptTransfer(StorageError):
    """What lies in a storage is not what was sent."""


@contextlib.contextmanager
def explain_storage_error(what: str, refusals: ErrorTypes, silences: ErrorTypes) -> Iterator[None]:
    """Turn the system's and a driver's errors into ours; `what` says what was being done, and where."""
    try:
        yield
    except (OSError, *refusals, *silences) as error:
        raise _explanation(error, what, silences) from error


def _explanation(error: Exception, what: str, silences: ErrorTypes) -> StorageError:
    number = getattr(error, "errno", None)
    text = f"{type(error).__name__}: {error}"
    if number in SILENCES or isinstance(error, (TimeoutError, ConnectionError, *silences)):
        return StorageUnreachable(f"{what}: no answer ({text}); check address and network; trying again is safe")
    if number in REMEDIES:
        rule, way_out = REMEDIES[number]
        return StorageError(f"{what}: {rule} ({text}); {way_out}")
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        return StorageError(
            f"{what}: access is refused ({text}); check the credentials in the environment of this process, its clock, "
            "and its rights there"
        )
    if isinstance(error, FileNotFoundError):
        return StorageError(f"{what}: {text}; create the bucket or the folder, or correct the URL")
    return StorageError(f"{what}: {text}; check that the storage is what its URL says")
