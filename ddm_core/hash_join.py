"""Find many 64-bit hashes among many others, all of them on the disk, in memory of a bounded size.

Hashes are spread evenly. So each pass takes those of one range of values, sorts them, and looks up what is wanted of
the same range. Every pass reads all of them; memory does not grow with their number.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int64

MAX_ROWS = 2**22
"""Hashes that are sorted at a time; with their positions and their order they take 40 bytes each."""

BLOCK_ROWS = 2**20
"""Hashes that are read at a time."""

NOT_FOUND = -1

Hashes = Int64[np.ndarray, " row"]


def find_positions(known: Hashes, wanted: Hashes, found: Hashes, max_rows: int | None = None) -> int:
    """Write where each wanted hash comes first in the known ones into `found`, or `NOT_FOUND`.

    All may be memory-mapped; `max_rows` is by default `MAX_ROWS`. Returns the position of a known hash that an earlier
    one equals, or `NOT_FOUND`.
    """
    repeated = NOT_FOUND
    for low, high in _ranges(len(known), max_rows or MAX_ROWS):
        rows = np.concatenate([start + inside.nonzero()[0] for start, _, inside in _blocks(known, low, high)])
        values = np.concatenate([block[inside] for _, block, inside in _blocks(known, low, high)])
        order = np.argsort(values, kind="stable")
        values, rows = values[order], rows[order]
        if (equal := np.flatnonzero(values[1:] == values[:-1])).size:
            repeated = int(rows[equal[0] + 1])
        for start, block, inside in _blocks(wanted, low, high):
            chosen = block[inside]
            place = np.searchsorted(values, chosen)
            is_known = place < len(values)
            is_known[is_known] = values[place[is_known]] == chosen[is_known]
            result = np.full(len(chosen), NOT_FOUND, np.int64)
            result[is_known] = rows[place[is_known]]
            found[start : start + len(block)][inside] = result
    return repeated


def _ranges(count: int, max_rows: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of values, ends included, that each have about `max_rows` of so many hashes."""
    passes = max(1, -(-count // max_rows))
    cuts = [-(2**63) + 2**64 * number // passes for number in range(passes + 1)]
    yield from ((low, high - 1) for low, high in zip(cuts[:-1], cuts[1:], strict=True))


def _blocks(hashes: Hashes, low: int, high: int) -> Iterator[tuple[int, Hashes, Bool[np.ndarray, " block"]]]:
    """Yield the first position and the hashes of every block, and which of them are in a range; at least one block."""
    for start in range(0, max(len(hashes), 1), BLOCK_ROWS):
        block = np.asarray(hashes[start : start + BLOCK_ROWS])
        yield start, block, (block >= low) & (block <= high)
