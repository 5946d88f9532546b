"""Objects in an object storage, through fsspec's drivers; nothing is cached, so changes are visible at once.

S3 and compatible servers are tested. For Google's storage the calls are the same, but untested.
"""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from orchestrator.islands.storage.errors import ErrorTypes, StorageError
from orchestrator.islands.storage.index import Entry
from orchestrator.islands.storage.object_store import hash_stream

IN_MEMORY_BYTES = 32 << 20
"""Largest file that is read, checked and uploaded in one piece."""

OPTIONS = {"s3": {"endpoint_url", "profile", "region_name"}, "gs": {"endpoint_url", "project"}, "memory": set[str]()}
"""Options that the configuration may set; all others, credentials included, come from the environment."""

S3_TIMEOUTS: dict[str, Any] = {
    "connect_timeout": 4,
    "read_timeout": 7,
    "retries": {"mode": "standard", "total_max_attempts": 2},
}
"""A call to an address without a server ends after about 10 s, to a frozen server after about 15 s."""


class RemoteStore:
    """Objects in a bucket, or in this process's memory."""

    def __init__(self, scheme: str, root: str, options: Mapping[str, str]) -> None:
        if unknown := sorted(options.keys() - OPTIONS[scheme]):
            raise StorageError(
                f"{scheme}: storage has the options {', '.join(sorted(OPTIONS[scheme])) or 'none'}, not "
                f"{', '.join(unknown)}; put credentials into the environment"
            )
        self.scheme, self.root = scheme, root
        try:
            self._file_system = _open_file_system(scheme, dict(options))
            self.refusal_errors, self.unreachable_errors = _import_errors(scheme)
        except ImportError as error:
            raise StorageError(
                f"{scheme}: storage needs a driver ({error}); pip install 'decentralized-diffusion[cloud]'"
            ) from error

    def read(self, key: str) -> bytes | None:
        """Read a small object; return None if there is none."""
        single_request = {"max_concurrency": 1} if self.scheme == "s3" else {}
        try:
            return bytes(self._call("cat_file", key, **single_request))
        except FileNotFoundError:
            return None

    def write(self, key: str, data: bytes) -> None:
        """Write a small object, replacing any present one."""
        self._call("pipe_file", key, data)

    def create(self, key: str, data: bytes) -> bool:
        """Write a small object if there is none, by a conditional put; return whether it was written."""
        if self.scheme == "memory":
            raise StorageError("memory: has no conditional write; use a local folder or an object storage")
        try:
            self._call("pipe_file", key, data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            if _get_code(error) == "PreconditionFailed":
                return False
            raise
        return True

    def upload(self, key: str, file: BinaryIO, entry: Entry) -> bool:
        """Write the content of `file`; write nothing and return False if it no longer matches the entry."""
        if entry.bytes > IN_MEMORY_BYTES:
            return self._upload_large(key, file)
        data = bytearray()
        is_unchanged = hash_stream(file, entry.bytes, data.extend) == entry
        if is_unchanged:
            self._call("pipe_file", key, bytes(data))
        return is_unchanged

    def _upload_large(self, key: str, file: BinaryIO) -> bool:
        """Upload a file by its descriptor, since its name may be gone by now; delete the object if it has changed."""
        before = _get_stamp(file)
        file.seek(0)
        self._file_system.put_file(f"/dev/fd/{file.fileno()}", self._path(key))
        is_unchanged = _get_stamp(file) == before
        if not is_unchanged:
            self.delete(key)
        return is_unchanged

    def download(self, key: str, target: Path) -> None:
        """Copy an object into a new file; raise FileNotFoundError if there is none."""
        self._call("get_file", key, str(target))

    def list_sizes(self, folder: str) -> dict[str, int]:
        """Return the bytes of every object directly in a folder, by the last part of its key."""
        try:
            rows = self._call("ls", folder, detail=True)
        except FileNotFoundError:
            return {}
        return {row["name"].rpartition("/")[2]: row["size"] for row in rows if row["type"] == "file"}

    def list_keys(self, key: str) -> list[str]:
        """Return the keys of all objects below a folder, or `key` itself if it is an object."""
        path = self._path(key)
        return [key + name.lstrip("/").removeprefix(path.lstrip("/")) for name in self._call("find", key)]

    def delete(self, key: str) -> None:
        """Delete an object; an absent one is no error."""
        with contextlib.suppress(FileNotFoundError):
            self._call("rm_file", key)

    def _call(self, method: str, key: str, *arguments: object, **options: object) -> Any:
        """Call the driver; it raises FileNotFoundError only if the storage itself reports that the key is absent."""
        try:
            return getattr(self._file_system, method)(self._path(key), *arguments, **options)
        except FileNotFoundError as error:
            code = _get_code(error)
            if code == "NoSuchBucket":
                raise StorageError(f"{self.root}: there is no such bucket; create it, or correct the URL") from error
            if code not in ("", "NoSuchKey"):
                raise ConnectionError(f"a server responds with {code}, but not as an object storage does") from error
            raise

    def _path(self, key: str) -> str:
        return f"{self.root}/{key}"


def _open_file_system(scheme: str, options: dict[str, str]) -> Any:
    """Open fsspec's file system without its caches."""
    if scheme != "s3":
        return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True, **options)
    region = {"region_name": options.pop("region_name")} if "region_name" in options else {}
    file_system = fsspec.filesystem(
        "s3",
        config_kwargs=S3_TIMEOUTS,
        client_kwargs=region,
        max_concurrency=2,
        use_listings_cache=False,
        skip_instance_cache=True,
        **options,
    )
    file_system.retries = 1
    return file_system


def _import_errors(scheme: str) -> tuple[ErrorTypes, ErrorTypes]:
    """Return the errors besides OSError that a driver raises for a refusal, and for no response."""
    if scheme == "s3":
        from aiohttp import ClientError as ConnectionLost
        from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError

        return (BotoCoreError, ClientError), (ConnectionError, HTTPClientError, ConnectionLost)
    if scheme == "gs":
        from aiohttp import ClientError as ConnectionLost
        from gcsfs.retry import HttpError
        from google.auth.exceptions import GoogleAuthError, TransportError

        return (HttpError, GoogleAuthError), (TransportError, ConnectionLost)
    return (), ()


def _get_code(error: BaseException) -> str:
    """Return S3's code for an error, which its driver stores in the cause; empty if there is none."""
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _get_stamp(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns
