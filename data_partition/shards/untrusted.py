"""Checks of untrusted text, and the stream that untrusted bytes come from."""

import re
from typing import Protocol, runtime_checkable

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


@runtime_checkable
class ByteStream(Protocol):
    """A stream of bytes that is read in order."""

    def read(self, size: int = ..., /) -> bytes:
        """Return the next `size` bytes, fewer at the end."""
        ...

    def close(self) -> None:
        """Close the stream."""
