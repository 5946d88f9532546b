"""Which addresses may be opened, and how: the one file of the rooms below that knows fsspec."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable
from urllib.parse import urlsplit

import fsspec

from data_partition.errors import UrlRefused

CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
"""ASCII's and Unicode's control characters: an escape sequence can rewrite what a terminal shows."""


def is_showable(text: str) -> bool:
    """Whether a text has neither control characters, line ends and tabs among them, nor what cannot be written."""
    return CONTROLS.search(text) is None and printable(text) == text


def printable(text: str) -> str:
    """The text with what no encoding can write (half a character, a byte that is not UTF-8) as an escape."""
    return text.encode("utf-8", "backslashreplace").decode()


SCHEMES = ("file", "s3", "gs", "gcs", "http", "https")
"""Everything else is refused, above all `pipe:`, which would run a command."""


@runtime_checkable
class ByteStream(Protocol):
    """Bytes that are read in order."""

    def read(self, size: int = ..., /) -> bytes:
        """The next `size` bytes, fewer at the end."""
        ...

    def close(self) -> None:
        """Give it back."""


def check_url(url: str) -> str:
    """`url` itself if its scheme is allowed or it is a plain path; raises `UrlRefused`."""
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
