"""Open data by path or URL, whole or in ranges; no other file of this package uses fsspec or requests.

Every failure has one of four names: what is not there (`SourceMissing`), what is forbidden (`AccessDenied`), a driver
that is not installed (`MissingExtra`), and what a retry may cure (`SourceUnreachable`). Messages show no query of a
URL, and the original errors are dropped, since these do show it.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import fsspec
import requests

from data_partition.errors import (
    AccessDenied,
    DataError,
    MissingExtra,
    ShardError,
    SourceMissing,
    SourceUnreachable,
    UrlRefused,
)
from data_partition.shards.untrusted import ByteStream, make_printable
from ddm_core.url_queries import reveal_query, without_secrets

log = logging.getLogger(__name__)

SCHEMES = ("file", "s3", "gs", "gcs", "http", "https")
"""Allowed URL schemes; all others are refused, above all `pipe:`, which would run a command."""

TIMEOUTS_S = (10, 60)
"""To connect, and between two pieces of an answer."""

FORBIDDEN = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.PROXY_AUTHENTICATION_REQUIRED)
PASSING = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)

RETRY_AFTER_S = (0.5, 2.0, 8.0)
"""Waits before a file is read again after its server failed."""

MAX_RANGE_S = 120.0
"""Longest time for one answer to a request for a range, however the server spreads its bytes."""

MAX_REASON = 300
"""Characters of another library's message that are shown."""


def check_url(url: str) -> str:
    """Return `url` if its scheme is allowed or it is a plain path; raises `UrlRefused` otherwise."""
    scheme = urlsplit(url).scheme.lower()
    if ("::" in url) or (scheme and scheme not in SCHEMES) or url.lstrip().startswith("|"):
        raise UrlRefused(
            f"{without_secrets(url)!r} is not opened: a data URL is a plain path or starts with one of "
            f"{', '.join(f'{name}:' for name in SCHEMES)}; copy the files to such a place"
        )
    return url


@contextmanager
def open_url(url: str) -> Iterator[ByteStream]:
    """Open `url` for reading bytes in order.

    Opening and reading raise `UrlRefused`, `SourceMissing`, `AccessDenied`, `MissingExtra` or `SourceUnreachable`.
    """
    name = _name(url)
    with _errors_named(name):
        stream = _open(url, name)
    with closing(stream):
        yield _NamedStream(stream, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileState:
    """What tells a file from what it is after a change."""

    size: int
    """Bytes."""
    etag: str = ""
    """By the server; empty for a file of a disk."""


def describe_url(url: str) -> FileState:
    """Return the state of a file; raises like `open_url`, and `ShardError` for a server that sends no ranges."""
    name = _name(url)
    with _errors_named(name):
        parts = urlsplit(url)
        if parts.scheme.lower() in ("http", "https"):
            with closing(_request_range(url, name, 0, 1)) as answer:
                size = answer.headers.get("Content-Range", "").rpartition("/")[2]
                return FileState(size=int(size) if size.isdigit() else 0, etag=answer.headers.get("ETag", ""))
        if (path := _local_path(url)) is not None:
            return FileState(size=path.stat().st_size)
        system, remote = fsspec.core.url_to_fs(url)
        system.invalidate_cache()
        details = system.info(remote)
        return FileState(size=int(details["size"]), etag=str(details.get("ETag") or details.get("etag") or ""))


def read_range(url: str, start: int, stop: int) -> bytes:
    """Return the bytes from `start` to `stop`, fewer where the file ends; tries again if its server fails.

    Raises `SourceUnreachable` once `RETRY_AFTER_S` is used up, or at once another error of `describe_url`.
    """
    name = _name(url)
    for wait_s in RETRY_AFTER_S:
        try:
            return _read_range(url, name, start, stop)
        except SourceUnreachable as error:
            log.warning("%s; read again in %.1f s", error, wait_s)
            time.sleep(wait_s)
    return _read_range(url, name, start, stop)


def is_local(url: str) -> bool:
    """Return whether a URL is a file of a disk."""
    return _local_path(url) is not None


@contextmanager
def _errors_named(name: str) -> Iterator[None]:
    """Raise errors of drivers as those of this module."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - the border to drivers, each of which has errors of its own
        raise _explain(error, name) from None


def _read_range(url: str, name: str, start: int, stop: int) -> bytes:
    with _errors_named(name):
        if (path := _local_path(url)) is not None:
            with path.open("rb") as file:
                file.seek(start)
                return file.read(stop - start)
        if urlsplit(url).scheme.lower() in ("http", "https"):
            return _read_http_range(url, name, start, stop)
        system, remote = fsspec.core.url_to_fs(url)
        return bytes(system.cat_file(remote, start=start, end=stop))


def _read_http_range(url: str, name: str, start: int, stop: int) -> bytes:
    pieces, deadline = [], time.monotonic() + MAX_RANGE_S
    with closing(_request_range(url, name, start, stop)) as answer:
        while piece := answer.raw.read1(2**16):
            pieces.append(piece)
            if time.monotonic() > deadline:
                raise SourceUnreachable(
                    f"{name} sent {sum(map(len, pieces))} of {stop - start} bytes in {MAX_RANGE_S:g} s; the server is "
                    "too slow, try again later with `ddm resume`"
                )
        expected = int(answer.headers.get("Content-Length", 0))
    if (received := sum(map(len, pieces))) < expected:
        raise SourceUnreachable(f"{name} broke off after {received} of {expected} bytes; continue with `ddm resume`")
    return b"".join(pieces)


def _request_range(url: str, name: str, start: int, stop: int) -> requests.Response:
    """Ask an HTTP server for a range; raises `ShardError` if it sends the whole file."""
    answer = _request(url, name, {"Range": f"bytes={start}-{stop - 1}"})
    if answer.status_code == HTTPStatus.PARTIAL_CONTENT:
        return answer
    answer.close()
    raise ShardError(
        f"{name}: the server sends no ranges of bytes, which data.mode=stream needs; set data.mode=copy, or copy the "
        "files to another server"
    )


@dataclass(frozen=True, slots=True)
class _NamedStream:
    """A stream whose errors are named."""

    stream: ByteStream
    name: str

    def read(self, size: int = -1, /) -> bytes:
        """Return the next `size` bytes, fewer at the end; raises an error of this module."""
        with _errors_named(self.name):
            return self.stream.read(size)

    def close(self) -> None:
        """Close the stream."""
        self.stream.close()


def _name(url: str) -> str:
    """Return an allowed URL as it is shown; raises `UrlRefused`."""
    return make_printable(without_secrets(url) if "://" in check_url(url) else url)


def _local_path(url: str) -> Path | None:
    """Return the path of a file of a disk, None for another URL."""
    parts = urlsplit(url)
    if parts.scheme.lower() not in ("", "file"):
        return None
    return Path(url2pathname(parts.path) if parts.scheme else url)


def _open(url: str, name: str) -> ByteStream:
    if urlsplit(url).scheme.lower() in ("http", "https"):
        raw: ByteStream = _request(url, name).raw
        return raw
    if (path := _local_path(url)) is not None:
        return path.open("rb")
    system, remote = fsspec.core.url_to_fs(url)
    stream: ByteStream = system.open(remote, "rb")
    return stream


def _request(url: str, name: str, headers: Mapping[str, str] | None = None) -> requests.Response:
    """Return an HTTP server's answer, of which only the head is read."""
    try:
        url = reveal_query(url)
    except KeyError as error:
        raise AccessDenied(
            f"the query of {name} is not on this machine ({error} is missing); give data.path with the whole URL again"
        ) from None
    asked = {"Accept-Encoding": "identity", **(headers or {})}
    answer = requests.get(url, stream=True, timeout=TIMEOUTS_S, headers=asked)
    if answer.ok:
        return answer
    answer.close()
    status = f"HTTP {answer.status_code} {make_printable(answer.reason or '')[:MAX_REASON]}".rstrip()
    if answer.status_code in FORBIDDEN:
        raise AccessDenied(f"{name}: {status}; make a new signed URL if this one has expired, or give credentials")
    if answer.status_code in PASSING or answer.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
        raise SourceUnreachable(f"{name}: {status}; the server is busy or fails, try again later with `ddm resume`")
    raise SourceMissing(f"{name}: {status}; correct data.path")


def _explain(error: Exception, name: str) -> DataError:
    """Return what an error of a driver means."""
    reason = make_printable(without_secrets(f"{type(error).__name__}: {error}"))[:MAX_REASON]
    if isinstance(error, FileNotFoundError):
        return SourceMissing(f"{name} does not exist; correct data.path")
    if isinstance(error, IsADirectoryError):
        return SourceMissing(f"{name} is a folder; give the tars in it, such as data.path={name}/{{000..009}}.tar")
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        return AccessDenied(f"{name} may not be read ({reason}); give this user the right, or set credentials")
    if isinstance(error, ImportError):
        return MissingExtra(f"{name} needs a driver ({reason}); pip install 'decentralized-diffusion[cloud]'")
    if isinstance(error, requests.exceptions.InvalidSchema):
        return UrlRefused(f"{name} redirects to a URL that is not opened ({reason}); give the address of the file")
    return SourceUnreachable(f"{name} cannot be read ({reason}); check the network, then continue with `ddm resume`")
