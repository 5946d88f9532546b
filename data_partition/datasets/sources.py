"""Data sources: one function for each.

A source yields samples at their original size, or an `Unreadable` in place of one. To add a source, write the
function, add it to `SOURCES` and its name to `DataConfig.source`.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.metadata import distribution
from typing import TypeVar

import numpy as np

from data_partition.config import DataConfig
from data_partition.datasets.fashion_mnist import CLASS_NAMES, HELD_OUT_ROWS, find_fashion, read_split
from data_partition.datasets.image_folder import check_root, list_class_names, list_image_tree, read_found
from data_partition.datasets.packaged import EMOJI_CATEGORIES, read_emoji, read_packaged_fashion
from data_partition.datasets.parquet_source import list_parquet, read_class_list, read_parquet_file
from data_partition.datasets.source import Reading, Source
from data_partition.datasets.webdataset_source import list_urls, read_numbered_tar
from data_partition.shards.shards import Sample

T = TypeVar("T")

BLOCK_FILES = 256
"""Files of a folder that are read in one go."""


def fashion(config: DataConfig) -> Source:
    """Return the source of 8,000 Fashion-MNIST images that this package contains; no download."""
    return Source(class_names=CLASS_NAMES, train=Reading.whole(lambda: read_packaged_fashion(captions=config.captions)))


def emoji(config: DataConfig) -> Source:
    """Return the source of 1,906 captioned emoji in two styles that this package contains; no download.

    `data.holdout` is the share of emoji that is held out, in both styles.
    """
    return Source(
        class_names=EMOJI_CATEGORIES,
        train=Reading.whole(lambda: read_emoji(config.holdout, held_out=False)),
        test=Reading.whole(lambda: read_emoji(config.holdout, held_out=True)),
    )


def fashion_full(config: DataConfig) -> Source:
    """Return the source of all 60,000 training images of Fashion-MNIST; test rows 0 to 4,999 are held out.

    Test rows 5,000 to 9,999 are never read: they remain an untouched test set, to detect tuning to the held-out rows.
    """
    folder = find_fashion(config.path)
    return Source(
        class_names=CLASS_NAMES,
        train=Reading.whole(lambda: read_split(folder, "train", 60_000)),
        test=Reading.whole(lambda: read_split(folder, "t10k", HELD_OUT_ROWS)),
    )


def digits(config: DataConfig) -> Source:
    """Return the source of 1,797 handwritten digits of 8 x 8 pixels, from scikit-learn."""
    return Source(class_names=tuple("0123456789"), train=Reading.whole(_digits))


def image_folder(config: DataConfig) -> Source:
    """Return the source of a folder of images; its direct subfolders are the classes, in the order of their names."""
    root = check_root(config.path)
    class_names = list_class_names(root) if config.labels else ()
    return Source(
        class_names=class_names,
        train=Reading(
            lambda: in_blocks(list_image_tree(root, class_names, config)),
            partial(read_found, root, class_names, config),
        ),
    )


def webdataset(config: DataConfig) -> Source:
    """Return the source of tars at a brace-expanded path or URL, such as `s3://bucket/train-{0000..0099}.tar`."""
    return Source(
        class_names=(), train=Reading(lambda: enumerate(list_urls(config.path)), partial(read_numbered_tar, config))
    )


def parquet(config: DataConfig) -> Source:
    """Return the source of a Parquet file, or of all those in a folder, such as a saved Hugging Face data set."""
    class_names = read_class_list(config.path) if config.labels else ()
    return Source(
        class_names=class_names,
        train=Reading(lambda: enumerate(list_parquet(config.path)), partial(read_parquet_file, config)),
    )


def in_blocks(found: Iterable[T], size: int = BLOCK_FILES) -> Iterator[list[T]]:
    """Yield consecutive lists of at most `size` entries."""
    entries = iter(found)
    while block := list(itertools.islice(entries, size)):
        yield block


def _digits() -> Iterator[Sample]:
    file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    rows = np.loadtxt(str(file), delimiter=",")  # `load_digits` reads the same, after seconds of imports
    images = np.round(rows[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    for row, (image, label) in enumerate(zip(images, rows[:, -1], strict=True)):
        yield Sample(key=f"digits-{row:04d}", image=image[:, :, None], label=int(label))


SOURCES: dict[str, Callable[[DataConfig], Source]] = {
    "fashion": fashion,
    "emoji": emoji,
    "fashion_full": fashion_full,
    "digits": digits,
    "image_folder": image_folder,
    "webdataset": webdataset,
    "parquet": parquet,
}


def open_reading(part: str, config: DataConfig) -> Reading:
    """Return the reading of `train` or `test` of a configured source."""
    source = SOURCES[config.source](config)
    return source.test if part == "test" and source.test is not None else source.train
