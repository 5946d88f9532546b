"""Objects in an object storage, through fsspec's drivers; nothing is cached, so a change is seen at once.

S3 and what speaks like it is tested; for Google's storage the calls are the same, and so far untested.
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

IN_MEMORY = 32 << 20
"""Up to so many bytes are read, checked and sent in one piece."""

OPTIONS = {"s3": {"endpoint_url", "profile", "region_name"}, "gs": {"endpoint_url", "project"}, "memory": set[str]()}
"""What may be set by configuration; the rest, above all credentials, comes from the environment."""

S3_PATIENCE: dict[str, Any] = {
    "connect_timeout": 4,
    "read_timeout": 7,
    "retries": {"mode": "standard", "total_max_attempts": 2},
}
"""A call to a dead address ends after about 10 s, to a frozen one after about 15 s."""


class RemoteStore:
    """Objects in a bucket, or in this process's memory."""

    def __init__(self, scheme: str, root: str, options: Mapping[str, str]) -> None:
        if unknown := sorted(options.keys() - OPTIONS[scheme]):
            raise StorageError(
                f"{scheme}: storage has the options {', '.join(sorted(OPTIONS[scheme])) or 'none'}, not "
                f"{', '.join(unknown)}; credentials come from the environment"
            )
        self.scheme, self.root = scheme, root
        try:
            self._files = _file_system(scheme, dict(options))
            self.refusals, self.silences = _errors_of(scheme)
        except ImportError as error:
            raise StorageError(
                f"{scheme}: storage needs a driver ({error}); pip install 'decentralized-diffusion[cloud]'"
            ) from error

    def read(self, key: str) -> bytes | None:
        """A small object; None if there is none."""
        whole = {"max_concurrency": 1} if self.scheme == "s3" else {}
        try:
            return bytes(self._call("cat_file", key, **whole))
        except FileNotFoundError:
            return None

    def write(self, key: str, data: bytes) -> None:
        """Write a small object over whatever was there."""
        self._call("pipe_file", key, data)

    def create(self, key: str, data: bytes) -> bool:
        """Write a small object unless there is one, by a conditional put."""
        if self.scheme == "memory":
            raise StorageError("memory: has no conditional write; use a local folder or an object storage")
        try:
            self._call("pipe_file", key, data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            if _code(error) == "PreconditionFailed":
                return False
            raise
        return True

    def send(self, key: str, file: BinaryIO, entry: Entry) -> bool:
        """Write what `file` holds; False, and nothing written, if that is not what the entry says any more."""
        if entry.bytes > IN_MEMORY:
            return self._send_large(key, file)
        data = bytearray()
        same = hash_stream(file, entry.bytes, data.extend) == entry
        if same:
            self._call("pipe_file", key, bytes(data))
        return same

    def _send_large(self, key: str, file: BinaryIO) -> bool:
        """Send a file by its descriptor, since its name may be gone by now, and take it back if it has changed."""
        before = _stamp(file)
        file.seek(0)
        self._files.put_file(f"/dev/fd/{file.fileno()}", self._path(key))
        same = _stamp(file) == before
        if not same:
            self.remove(key)
        return same

    def fetch(self, key: str, target: Path) -> None:
        """Copy an object into a new file; raises FileNotFoundError."""
        self._call("get_file", key, str(target))

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of every object directly in a folder, by the last part of its key."""
        try:
            rows = self._call("ls", folder, detail=True)
        except FileNotFoundError:
            return {}
        return {row["name"].rpartition("/")[2]: row["size"] for row in rows if row["type"] == "file"}

    def below(self, key: str) -> list[str]:
        """Keys of all objects in a folder, however deep, or of the one that is called so."""
        path = self._path(key)
        return [key + name.lstrip("/").removeprefix(path.lstrip("/")) for name in self._call("find", key)]

    def remove(self, key: str) -> None:
        """Delete an object; one that is not there is fine."""
        with contextlib.suppress(FileNotFoundError):
            self._call("rm_file", key)

    def _call(self, verb: str, key: str, *values: object, **how: object) -> Any:
        """Ask the driver; FileNotFoundError then means that the storage itself has said so about this key."""
        try:
            return getattr(self._files, verb)(self._path(key), *values, **how)
        except FileNotFoundError as error:
            code = _code(error)
            if code == "NoSuchBucket":
                raise StorageError(f"{self.root}: there is no such bucket; create it, or correct the URL") from error
            if code not in ("", "NoSuchKey"):
                raise ConnectionError(f"something answers {code}, but not as an object storage does") from error
            raise

    def _path(self, key: str) -> str:
        return f"{self.root}/{key}"


def _file_system(scheme: str, options: dict[str, str]) -> Any:
    """fsspec's file system without its caches."""
    if scheme != "s3":
        return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True, **options)
    region = {"region_name": options.pop("region_name")} if "region_name" in options else {}
    files = fsspec.filesystem(
        "s3",
        config_kwargs=S3_PATIENCE,
        client_kwargs=region,
        max_concurrency=2,
        use_listings_cache=False,
        skip_instance_cache=True,
        **options,
    )
    files.retries = 1
    return files


def _errors_of(scheme: str) -> tuple[ErrorTypes, ErrorTypes]:
    """What a driver raises beside OSError: refusals and silences."""
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


def _code(error: BaseException) -> str:
    """S3's name for an error, which its driver keeps in the cause."""
    answer = getattr(error.__cause__, "response", None) or {}
    return str(answer.get("Error", {}).get("Code", ""))


def _stamp(file: BinaryIO) -> tuple[int, int]:
    state = os.fstat(file.fileno())
    return state.st_size, state.st_mtime_ns
