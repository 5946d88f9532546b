"""Open data by path or URL; no other file of this package uses fsspec or requests.

Every failure has one of four names: what is not there (`SourceMissing`), what is forbidden (`AccessDenied`), a driver
that is not installed (`MissingExtra`), and what a retry may cure (`SourceUnreachable`). Messages show no query of a
URL, and the original errors are dropped, since these do show it.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import fsspec
import requests

from data_partition.errors import AccessDenied, DataError, MissingExtra, SourceMissing, SourceUnreachable, UrlRefused
from data_partition.shards.untrusted import ByteStream, make_printable
from ddm_core.url_queries import reveal_query, without_secrets

SCHEMES = ("file", "s3", "gs", "gcs", "http", "https")
"""Allowed URL schemes; all others are refused, above all `pipe:`, which would run a command."""

TIMEOUTS_S = (10, 60)
"""To connect, and between two pieces of an answer."""

FORBIDDEN = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.PROXY_AUTHENTICATION_REQUIRED)
PASSING = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)

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
    name = make_printable(without_secrets(url) if "://" in check_url(url) else url)
    try:
        stream = _open(url, name)
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - the border to drivers, each of which has errors of its own
        raise _explain(error, name) from None
    with closing(stream):
        yield _NamedStream(stream, name)


@dataclass(frozen=True, slots=True)
class _NamedStream:
    """A stream whose errors are named."""

    stream: ByteStream
    name: str

    def read(self, size: int = -1, /) -> bytes:
        """Return the next `size` bytes, fewer at the end; raises an error of this module."""
        try:
            return self.stream.read(size)
        except Exception as error:  # noqa: BLE001 - the border to drivers, each of which has errors of its own
            raise _explain(error, self.name) from None

    def close(self) -> None:
        """Close the stream."""
        self.stream.close()


def _open(url: str, name: str) -> ByteStream:
    parts = urlsplit(url)
    if parts.scheme.lower() in ("http", "https"):
        return _open_http(url, name)
    if parts.scheme.lower() in ("", "file"):
        return Path(url2pathname(parts.path) if parts.scheme else url).open("rb")
    system, path = fsspec.core.url_to_fs(url)
    stream: ByteStream = system.open(path, "rb")
    return stream


def _open_http(url: str, name: str) -> ByteStream:
    try:
        url = reveal_query(url)
    except KeyError as error:
        raise AccessDenied(
            f"the query of {name} is not on this machine ({error} is missing); give data.path with the whole URL again"
        ) from None
    answer = requests.get(url, stream=True, timeout=TIMEOUTS_S, headers={"Accept-Encoding": "identity"})
    if answer.ok:
        stream: ByteStream = answer.raw
        return stream
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
