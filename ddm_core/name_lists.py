"""Lists of names in messages."""

from collections.abc import Sequence

MAX_NAMES = 5
"""Names that a message lists."""


def join_names(names: Sequence[str]) -> str:
    """Return the first names with commas between them, and the number of the others."""
    rest = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + rest
