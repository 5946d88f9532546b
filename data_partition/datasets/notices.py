"""What was not read and what was converted while a data set was read, counted and named."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator

from data_partition.datasets.source import Unreadable
from data_partition.shards.shards import Sample

log = logging.getLogger(__name__)

MAX_NAMED = 10_000
"""Samples and files that are kept by name; more are only counted."""


class Notices:
    """Counts of unread files by reason, and of samples by remark, with the name of the first of each."""

    def __init__(self) -> None:
        self.skipped: list[Unreadable] = []
        self.skipped_counts: Counter[str] = Counter()
        self.remark_counts: Counter[str] = Counter()
        self.num_unreadable = 0
        """Images that could not be read."""
        self._first: dict[str, str] = {}

    def readable(self, samples: Iterable[Sample | Unreadable]) -> Iterator[Sample]:
        """Yield the readable samples; log and count the others."""
        for sample in samples:
            if isinstance(sample, Sample):
                yield sample
            else:
                self._skip(sample)

    def _skip(self, sample: Unreadable) -> None:
        name = sample.name or sample.key
        self.num_unreadable += sample.is_image
        self.skipped_counts[sample.reason] += 1
        self._first.setdefault(sample.reason, name)
        if len(self.skipped) < MAX_NAMED:
            log.warning("skipped %s: %s", name, sample.reason)
            self.skipped.append(sample)

    def remark(self, sample: Sample, more: tuple[str, ...] = ()) -> None:
        """Count the remarks on a sample."""
        for remark in (*sample.remarks, *more):
            self.remark_counts[remark] += 1
            self._first.setdefault(remark, sample.name or sample.key)

    def name_unreadable(self) -> str:
        """Return the first three unreadable images with their reasons."""
        images = [sample for sample in self.skipped if sample.is_image]
        return ", ".join(f"{image.name or image.key} ({image.reason})" for image in images[:3])

    def texts(self) -> list[str]:
        """Return a sentence for each of the most frequent reasons and remarks."""
        counts = [("skipped", self.skipped_counts), ("read", self.remark_counts)]
        return [
            f"{count:,} {verb}: {text} ({'first: ' if count > 1 else ''}{self._first[text]})"
            for verb, counter in counts
            for text, count in counter.most_common(5)
        ] + [
            f"{counter.total():,} {verb} in all, for {len(counter)} reasons; dataset.json has them"
            for verb, counter in counts
            if len(counter) > 5
        ]
