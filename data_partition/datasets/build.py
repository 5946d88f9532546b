"""From a source to shards: resize every image, hold some out, and log the unreadable ones."""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from data_partition.config import DataConfig
from data_partition.datasets.source import Source, Unreadable, is_held_out
from data_partition.datasets.sources import SOURCES
from data_partition.errors import MissingLabels, NoSamples, TooManyUnreadable
from data_partition.shards.images import fit_image
from data_partition.shards.shards import Sample, ShardWriter
from ddm_core.artifacts import Preempted, Workspace, write_json

log = logging.getLogger(__name__)


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


def build_dataset(config: DataConfig, out: Path, workspace: Workspace) -> DatasetSummary:
    """Write `out/train`, `out/holdout` and `out/dataset.json`.

    Raises one of the errors in `errors.py` if the images do not match `config`.
    """
    source = SOURCES[config.source](config)
    build = _Build(config, source, out, workspace)
    with build.train, build.holdout:
        for sample in build.skip_unreadable(source.train()):
            held_out = source.test is None and is_held_out(sample.key, config.holdout)
            build.add(sample, build.holdout if held_out else build.train)
            if build.train.count == config.limit:
                break
        for sample in build.skip_unreadable(source.test() if source.test else iter(())):
            build.add(sample, build.holdout)
        return build.finish()


class _Build:
    """Both shard writers, and the counts so far."""

    def __init__(self, config: DataConfig, source: Source, out: Path, workspace: Workspace) -> None:
        self.config, self.source, self.out, self.workspace = config, source, out, workspace
        shape = (config.image_size, config.image_size, config.channels)
        self.train = ShardWriter(out / "train", config.shard_samples, image_shape=shape)
        self.holdout = ShardWriter(out / "holdout", config.shard_samples, image_shape=shape)
        self.label_counts: Counter[int] = Counter()
        self.highest_label = -1
        self.skipped: list[Unreadable] = []

    def skip_unreadable(self, samples: Iterator[Sample | Unreadable]) -> Iterator[Sample]:
        """Yield the readable samples; log and collect the others."""
        for sample in samples:
            if isinstance(sample, Sample):
                yield sample
            else:
                log.warning("skipped %s: %s", sample.key, sample.reason)
                self.skipped.append(sample)

    def add(self, sample: Sample, writer: ShardWriter) -> None:
        """Write one sample at the configured size; raises `MissingLabels`, `MixedSizes` or `Preempted`."""
        if self.config.labels and sample.label < 0:
            raise MissingLabels(
                f"{sample.key} has no class, and data.labels=true needs one for every sample; "
                "set data.labels=false to train without classes"
            )
        label = sample.label if self.config.labels else -1
        writer.add(replace(sample, label=label, image=fit_image(sample.image, self.config, sample.key)))
        self.highest_label = max(self.highest_label, label)
        if writer is self.train:
            self.label_counts[label] += 1
        done = self.train.count + self.holdout.count
        self.workspace.report_progress(done, None, unit="images")
        if self.workspace.stop_requested():
            raise Preempted(f"stopped after {done} images; reading starts again")

    def finish(self) -> DatasetSummary:
        """Check the counts, close the shards, write the summary; raises `TooManyUnreadable` or `NoSamples`."""
        self._check()
        class_names = self.source.class_names or tuple(str(label) for label in range(self.highest_label + 1))
        class_names = class_names if self.config.labels else ()
        for writer in (self.train, self.holdout):
            writer.class_names = class_names
            writer.close()
        summary = DatasetSummary(
            count=self.train.count,
            holdout_count=self.holdout.count,
            image_shape=self.train.image_shape,
            class_names=class_names,
            class_counts={name: self.label_counts[label] for label, name in enumerate(class_names)},
            skipped=tuple(self.skipped),
        )
        write_json(self.out / "dataset.json", summary)
        self.workspace.report_progress(
            summary.count + summary.holdout_count, summary.count + summary.holdout_count, unit="images"
        )
        return summary

    def _check(self) -> None:
        num_read = self.train.count + self.holdout.count
        share = len(self.skipped) / max(num_read + len(self.skipped), 1)
        if share > self.config.max_unreadable:
            names = ", ".join(f"{image.key} ({image.reason})" for image in self.skipped[:3])
            raise TooManyUnreadable(
                f"{len(self.skipped)} of {num_read + len(self.skipped)} images cannot be read, more than "
                f"data.max_unreadable={self.config.max_unreadable}: {names}; repair them or raise the limit"
            )
        if self.train.count == 0:
            raise NoSamples(
                f"data.source={self.config.source} with data.path={self.config.path} gave no training "
                "image; check the path, and that data.holdout leaves some images"
            )
        if self.holdout.count == 0:
            raise NoSamples(
                f"none of {num_read} images is held out, so nothing can be scored; raise data.holdout "
                f"above {self.config.holdout} or add images"
            )
