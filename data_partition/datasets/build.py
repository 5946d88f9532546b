"""From a source to shards: resize every image, hold some out, and say what was left out or converted."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from data_partition.config import DataConfig
from data_partition.datasets.captions import has_held_out_words
from data_partition.datasets.duplicates import find_repeated, leave_out_repeated, mark_repeated
from data_partition.datasets.notices import Notices
from data_partition.datasets.source import Reading, Source, Unreadable, holdout_share, is_held_out
from data_partition.datasets.sources import SOURCES, open_reading
from data_partition.datasets.webdataset_source import describe_annotations
from data_partition.errors import (
    InvalidCaptions,
    MissingLabels,
    MixedLabels,
    NoSamples,
    OneClass,
    TooManyUnreadable,
    UnknownClass,
)
from data_partition.shards.images import encode_png, fit_image, is_enlarged
from data_partition.shards.index_writer import OffsetIndexWriter
from data_partition.shards.shards import Sample, ShardWriter, read_index
from ddm_core.artifacts import Preempted, Workspace, write_json
from ddm_core.name_lists import join_names

NO_CAPTION = "no caption, so the null text"
ENLARGED = "enlarged, which makes no detail; a smaller data.image_size is as good"


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSummary:
    """Counts and classes of a data set; also written as `dataset.json`."""

    count: int
    holdout_count: int
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    class_counts: dict[str, int]
    """Training samples of each class."""
    skipped: tuple[Unreadable, ...]
    """The first `MAX_NAMED` samples and files that were not read."""
    skipped_counts: dict[str, int]
    """All of them, by reason."""
    remarks: dict[str, int]
    """Samples of which something was converted or left out, by remark."""


def build_dataset(
    config: DataConfig, out: Path, workspace: Workspace, known: tuple[str, ...] | None = None
) -> DatasetSummary:
    """Write `out/train`, `out/holdout` and `out/dataset.json`.

    `known` are the classes of earlier data that these are added to, in the order of their numbers.
    Raises one of the errors in `errors.py` if the images do not match `config`.
    """
    source = SOURCES[config.source](config)
    repeated = find_repeated(source, config, workspace) if config.duplicates == "remove" else {}
    build = _Build(config, source, out, workspace, known)
    with build.train, build.holdout:
        samples = build.read("train", source.train)
        if config.duplicates == "remove":
            samples = leave_out_repeated(samples, source, config, repeated)
        for sample in build.notices.readable(samples):
            held_out = source.test is None and is_held_out(sample.key, config.holdout)
            captions = (sample.caption, *(caption for caption, _ in sample.more_captions))
            held_out = held_out or any(has_held_out_words(text, config.held_out_captions) for text in captions)
            build.add(sample, build.holdout if held_out else build.train)
            if build.train.count == config.limit:
                break
        if source.test is not None:
            for sample in build.notices.readable(mark_repeated(build.read("test", source.test), repeated)):
                build.add(sample, build.holdout)
        return build.finish()


class _Build:
    """Both shard writers, and the counts so far."""

    def __init__(
        self, config: DataConfig, source: Source, out: Path, workspace: Workspace, known: tuple[str, ...] | None
    ) -> None:
        self.config, self.source, self.out, self.workspace, self.known = config, source, out, workspace, known
        shape, *buckets = [(*size, config.channels) for size in config.sizes]
        self.train, self.holdout = (
            OffsetIndexWriter(out / name, config, shape, buckets=tuple(buckets))
            if config.mode == "stream"
            else ShardWriter(out / name, config.shard_samples, image_shape=shape, buckets=tuple(buckets))
            for name in ("train", "holdout")
        )
        self.notices = Notices()
        self.classes = _Classes() if known is None else _KnownClasses(known, source.class_names)
        self.num_captions = 0
        self.smallest_share = 1.0

    def read(self, part: str, reading: Reading) -> Iterator[Sample | Unreadable]:
        """Yield the samples of `train` or `test` at the configured size, as files."""
        return self.workspace.engine.map(partial(_start_reading, part, self.config), reading.list_pieces())

    def add(self, sample: Sample, writer: ShardWriter | OffsetIndexWriter) -> None:
        """Write one sample; raises `MissingLabels`, `MixedLabels` or `Preempted`."""
        label = self.classes.number(sample) if self.config.labels else -1
        writer.add(replace(sample, label=label))
        if writer is self.train:
            self.classes.counts[label] = self.classes.counts.get(label, 0) + 1
        self.num_captions += bool(sample.caption)
        lacks_caption = self.config.captions and not sample.caption
        self.notices.remark(sample, (NO_CAPTION,) * lacks_caption)
        self.smallest_share = min(self.smallest_share, holdout_share(sample.key))
        done = self.train.count + self.holdout.count
        self.workspace.report_progress(done, None, unit="images")
        if self.workspace.stop_requested():
            raise Preempted(f"stopped after {done} images; reading starts again")

    def finish(self) -> DatasetSummary:
        """Check the counts, close the shards, write the summary; raises one of the errors of `_check`."""
        self._check()
        class_names = self.known or self.source.class_names or self.classes.names()
        class_names = class_names if self.config.labels else ()
        for writer in (self.train, self.holdout):
            writer.class_names = class_names
            writer.close()
        summary = DatasetSummary(
            count=self.train.count,
            holdout_count=self.holdout.count,
            image_shape=self.train.image_shape,
            class_names=class_names,
            class_counts={name: self.classes.counts.get(label, 0) for label, name in enumerate(class_names)},
            skipped=tuple(self.notices.skipped),
            skipped_counts=dict(self.notices.skipped_counts),
            remarks=dict(self.notices.remark_counts),
        )
        write_json(self.out / "dataset.json", summary)
        done = summary.count + summary.holdout_count
        self.workspace.report_progress(done, done, unit="images")
        for notice in (*self.notices.texts(), *_empty_classes(summary), *self._bucket_counts()):
            self.workspace.notify(notice)
        return summary

    def _bucket_counts(self) -> list[str]:
        """Return a sentence with the number of training images of every size, if there are several."""
        if not self.config.aspect_buckets:
            return []
        index = read_index(self.out / "train")
        counts = Counter(index.row_shapes)
        sizes = (f"{counts[shape]:,} of {shape[1]}x{shape[0]}" for shape in index.image_shapes)
        return [f"training images: {', '.join(sizes)}"]

    def _describe_annotations(self) -> str:
        if self.config.source != "webdataset":
            return ""
        key = self.config.caption_key or "caption or text"
        return f" in .txt or in the field {key} of .json: {describe_annotations(self.config.path)}"

    def _check(self) -> None:
        """Raise `TooManyUnreadable`, `NoSamples`, `OneClass` or `InvalidCaptions`."""
        num_read, num_bad = self.train.count + self.holdout.count, self.notices.num_unreadable
        if num_bad > self.config.max_unreadable * max(num_read + num_bad, 1):
            raise TooManyUnreadable(
                f"{num_bad} of {num_read + num_bad} images cannot be read, more than "
                f"data.max_unreadable={self.config.max_unreadable}: {self.notices.name_unreadable()}; "
                "repair them or raise the limit"
            )
        if self.train.count == 0:
            there = "; ".join(self.notices.texts()) or "nothing is there"
            raise NoSamples(
                f"data.source={self.config.source} with data.path={self.config.shown_path} gave no training "
                f"image of {num_read}: {there}; check the path, and that data.holdout leaves some images"
            )
        if self.holdout.count == 0 and self.known is None:
            raise NoSamples(
                f"none of {num_read} images is held out, so nothing can be scored; raise data.holdout from "
                f"{self.config.holdout} to {math.ceil(self.smallest_share * 1000 + 1) / 1000}, or add images"
            )
        if self.config.labels and len(self.classes.counts) == 1 and self.known is None:
            raise OneClass(
                f"all {self.train.count} training images are of one class; set data.labels=false to train without "
                "classes, or raise data.limit if it leaves only one"
            )
        if self.config.captions and self.num_captions == 0:
            raise InvalidCaptions(
                f"data.captions=true, and none of {num_read} images has a caption{self._describe_annotations()}; see "
                "data.captions for where they are looked for, or set it to false"
            )


def _start_reading(part: str, config: DataConfig) -> Callable[[Any], Iterator[Sample | Unreadable]]:
    """Return the function that yields the samples of a piece at the configured size, each with the file that is stored.

    It raises `MixedSizes`.
    """
    reading = open_reading(part, config)

    def read(piece: Any) -> Iterator[Sample | Unreadable]:
        for sample in reading.read_piece(piece):
            yield _as_stored(sample, config) if isinstance(sample, Sample) else sample

    return read


def _as_stored(sample: Sample, config: DataConfig) -> Sample:
    image = fit_image(sample.image, config, sample.name or sample.key)
    source = sample.source if image is sample.image else None
    remarks = (*sample.remarks, *(ENLARGED,) * is_enlarged(sample.image, image, config))
    return replace(sample, image=image, source=source or ("png", encode_png(image)), remarks=remarks)


class _Classes:
    """The classes seen so far: all of them numbers, or all of them words, which are numbered as they appear."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        """Training samples by class."""
        self.words: dict[str, int] = {}
        self.highest = -1
        self.first_name = ""

    def number(self, sample: Sample) -> int:
        """Return the number of a sample's class; raises `MissingLabels` or `MixedLabels`."""
        name = sample.name or sample.key
        if sample.label < 0 and not sample.class_name:
            raise MissingLabels(
                f"{name} has no class, and data.labels=true needs one for every sample; "
                "set data.labels=false to train without classes"
            )
        is_first = self.highest < 0
        self.first_name = name if is_first else self.first_name
        if not is_first and bool(self.words) != bool(sample.class_name):
            raise MixedLabels(
                f"the class of {self.first_name} is a {'word' if self.words else 'number'}, but that of {name} is "
                f"{sample.class_name or sample.label!r}; use words only or numbers only, or set data.labels=false"
            )
        label = self.words.setdefault(sample.class_name, len(self.words)) if sample.class_name else sample.label
        self.highest = max(self.highest, label)
        return label

    def names(self) -> tuple[str, ...]:
        """Return the words, or the numbers from 0 to the highest."""
        return tuple(self.words) or tuple(str(label) for label in range(self.highest + 1))


class _KnownClasses(_Classes):
    """The classes of earlier data; no other one may appear."""

    def __init__(self, known: tuple[str, ...], own: tuple[str, ...]) -> None:
        super().__init__()
        self.known, self.own = known, own

    def number(self, sample: Sample) -> int:
        """Return the number of a sample's class among the known; raises `MissingLabels` or `UnknownClass`."""
        label = super().number(sample)
        word = sample.class_name or (self.own[label] if label < len(self.own) else str(label))
        if word not in self.known:
            raise UnknownClass(
                f"{sample.name or sample.key} has the class {word!r}, and the data that it is added to have "
                f"{join_names(self.known)}; leave it out, or start a run with all data"
            )
        return self.known.index(word)


def _empty_classes(summary: DatasetSummary) -> list[str]:
    names = [name for name, count in summary.class_counts.items() if count == 0]
    return [f"no training image of class {join_names(names)}"] if names else []
