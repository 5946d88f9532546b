"""Names and captions come from strangers and end up on terminals, in logs and in file names."""

import re

CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
"""ASCII's and Unicode's control characters: an escape sequence can rewrite what a terminal shows."""


def is_showable(text: str) -> bool:
    """Whether a text has neither control characters, line ends and tabs among them, nor what cannot be written."""
    return CONTROLS.search(text) is None and printable(text) == text


def printable(text: str) -> str:
    """The text with what no encoding can write (half a character, a byte that is not UTF-8) as an escape."""
    return text.encode("utf-8", "backslashreplace").decode()
