"""What a source gives, whatever it reads."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from data_partition.shards.shards import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreadable:
    """A sample that could not be read, and why."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Samples to learn from, and those to compare with if the data set comes with some."""

    class_names: tuple[str, ...]
    """Empty: classes have no names, or there are none."""
    train: Callable[[], Iterator[Sample | Unreadable]]
    test: Callable[[], Iterator[Sample | Unreadable]] | None = None
    """None: `DataConfig.holdout` decides what is held out."""
