"""The interface of all data sources."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from data_partition.shards.shards import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreadable:
    """A sample that could not be read, and the reason."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Training samples, and test samples if the data set has its own."""

    class_names: tuple[str, ...]
    """Empty: the classes have no names, or the samples no classes."""
    train: Callable[[], Iterator[Sample | Unreadable]]
    test: Callable[[], Iterator[Sample | Unreadable]] | None = None
    """None: samples are held out by `DataConfig.holdout`."""


def is_held_out(key: str, share: float) -> bool:
    """Return whether a sample is held out; depends on its key alone."""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    return number < share * 2**64
