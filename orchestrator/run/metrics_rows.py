"""Rows of `metrics.jsonl`, of which a long training writes gigabytes: only a part of the file is read.

The file is an observation on which no result depends, so a damaged row is left out and blocks nothing.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TAIL_BYTES = 65_536
"""The last row is looked for in so many bytes at the end; a longer row counts as damaged."""


def read_last_row(path: Path) -> dict[str, Any] | None:
    """Return the last complete row that is not damaged; None if there is none near the end."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        *complete, _ = file.read().split(b"\n")
    return next((row for line in reversed(complete) if (row := parse_row(line)) is not None), None)


def sample_rows(path: Path, count: int) -> Iterator[dict[str, Any]]:
    """Yield up to `count` rows from places spread evenly over the bytes of the file, and then the last row."""
    step = -math.inf
    with path.open("rb") as file:
        size, position = file.seek(0, os.SEEK_END), file.seek(0)
        for number in range(count):
            if (target := size * number // count) > position:
                file.seek(target - 1)
                file.readline(TAIL_BYTES)  # the rest of the row before
            line = file.readline(TAIL_BYTES)
            position = file.tell()
            if (row := parse_row(line)) is not None and row["step"] > step:
                step = row["step"]
                yield row
    last = read_last_row(path)
    if last is not None and last["step"] > step:
        yield last


def parse_row(line: bytes | str) -> dict[str, Any] | None:
    """Return a row, whose step is a number; None if it is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and is_number(row.get("step")) else None


def is_number(value: object) -> bool:
    """Return whether a value of a row is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
