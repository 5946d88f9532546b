"""Engines: where the pieces of a stage of the data are computed. All engines return the same results in the same order.

A piece is a range of rows, a shard or a tar. `LocalEngine` computes one after the other in this process; that of
`data.engine=ray` (`orchestrator/backends/ray_data.py`) on many processes at once.
"""

from collections.abc import Callable, Generator, Iterable
from typing import Protocol, TypeVar, runtime_checkable

Piece = TypeVar("Piece")
Result = TypeVar("Result")


@runtime_checkable
class Engine(Protocol):
    """Maps pieces to results."""

    def map(
        self, start: Callable[[], Callable[[Piece], Iterable[Result]]], pieces: Iterable[Piece]
    ) -> Generator[Result]:
        """Yield the results of all pieces, in the order of the pieces.

        Every process calls `start` once, which loads what all pieces need, and returns the function that yields the
        results of one piece. Pieces, results and `start` may be sent to other machines, which share this one's disk.
        An error of a piece is raised here. Whoever closes the iterator stops the work.
        """


class LocalEngine:
    """Computes piece after piece in this process, each result when it is needed."""

    def map(
        self, start: Callable[[], Callable[[Piece], Iterable[Result]]], pieces: Iterable[Piece]
    ) -> Generator[Result]:
        """Yield the results of all pieces, in the order of the pieces."""
        work = start()
        for piece in pieces:
            yield from work(piece)


def row_ranges(start: int, stop: int, rows: int) -> list[tuple[int, int]]:
    """Divide the rows from `start` to `stop` at all multiples of `rows`."""
    cuts = [start, *range(start - start % rows + rows, stop, rows), stop]
    return list(zip(cuts[:-1], cuts[1:], strict=True)) if start < stop else []
