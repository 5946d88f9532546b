"""The interface of all data sources."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from data_partition.shards.shards import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreadable:
    """A sample or file that is not read, and why."""

    key: str
    reason: str
    name: str = ""
    """Its path as a person knows it."""
    is_image: bool = True
    """Whether it was meant to be an image: only these count towards `DataConfig.max_unreadable`."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Samples in pieces, such as tars; any process may read any piece."""

    list_pieces: Callable[[], Iterable[Any]]
    """What is sent to the processes: names, no images."""
    read_piece: Callable[[Any], Iterable[Sample | Unreadable]]

    @classmethod
    def whole(cls, read: Callable[[], Iterable[Sample | Unreadable]]) -> "Reading":
        """Return the reading of a source that is read in one piece."""
        return cls(lambda: [None], lambda piece: read())

    def __call__(self) -> Iterator[Sample | Unreadable]:
        """Yield the samples of all pieces in their order."""
        for piece in self.list_pieces():
            yield from self.read_piece(piece)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Training samples, and test samples if the data set has its own."""

    class_names: tuple[str, ...]
    """Empty: the classes have no names, or the samples no classes."""
    train: Reading
    test: Reading | None = None
    """None: samples are held out by `DataConfig.holdout`."""


def is_dropping(name: str) -> bool:
    """Return whether a file or folder is left behind by an operating system, and is never mentioned."""
    return name in ("Thumbs.db", "desktop.ini", ".DS_Store", "__MACOSX") or name.startswith("._")


def is_held_out(key: str, share: float) -> bool:
    """Return whether a sample is held out; depends on its key alone."""
    return holdout_share(key) < share


def holdout_share(key: str) -> float:
    """Return the share from 0 to 1 above which a sample is held out."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
