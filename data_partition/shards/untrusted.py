"""Checks of untrusted text and URLs; no other file of this package uses fsspec."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable
from urllib.parse import urlsplit

import fsspec

from data_partition.errors import UrlRefused

CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
"""Control characters of ASCII and Unicode: an escape sequence can rewrite the output of a terminal."""


def is_printable(text: str) -> bool:
    """Return whether a text has no control characters (line ends and tabs included) and no unencodable characters."""
    return CONTROL_CHARACTERS.search(text) is None and escape_unencodable(text) == text


def make_printable(text: str) -> str:
    """Escape control and unencodable characters, so that a text of a stranger can be shown on a terminal."""
    return CONTROL_CHARACTERS.sub(lambda match: repr(match[0])[1:-1], escape_unencodable(text))


def escape_unencodable(text: str) -> str:
    """Escape characters that UTF-8 cannot encode (half a surrogate pair, a byte that is not UTF-8)."""
    return text.encode("utf-8", "backslashreplace").decode()


SCHEMES = ("file", "s3", "gs", "gcs", "http", "https")
"""Allowed URL schemes; all others are refused, above all `pipe:`, which would run a command."""


@runtime_checkable
class ByteStream(Protocol):
    """A stream of bytes that is read in order."""

    def read(self, size: int = ..., /) -> bytes:
        """Return the next `size` bytes, fewer at the end."""
        ...

    def close(self) -> None:
        """Close the stream."""


def check_url(url: str) -> str:
    """Return `url` if its scheme is allowed or it is a plain path; raises `UrlRefused` otherwise."""
    scheme = urlsplit(url).scheme.lower()
    if ("::" in url) or (scheme and scheme not in SCHEMES) or url.lstrip().startswith("|"):
        raise UrlRefused(
            f"{url!r} is not opened: a data URL is a plain path or starts with one of "
            f"{', '.join(f'{name}:' for name in SCHEMES)}; copy the files to such a place"
        )
    return url


@contextmanager
def open_url(url: str) -> Iterator[ByteStream]:
    """Open `url` for reading bytes in order; raises `UrlRefused`, `OSError`, or `ImportError` without a driver."""
    with fsspec.open(check_url(url), "rb", compression=None) as file:
        yield file
