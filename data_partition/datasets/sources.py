"""Where images come from: one function for each source.

A source gives samples at their own size, or an `Unreadable` in place of one. To add a source, write the
function, add it to `SOURCES` and its name to `DataConfig.source`.
"""

from collections.abc import Callable, Iterator
from importlib.resources import files

import numpy as np
from sklearn.datasets import load_digits

from data_partition.config import DataConfig
from data_partition.datasets.fashion_mnist import CLASS_NAMES, HELD_OUT_ROWS, find_fashion, read_split
from data_partition.datasets.image_folder import class_folders, read_tree, tree_root
from data_partition.datasets.source import Source
from data_partition.datasets.webdataset_source import read_urls
from data_partition.shards.shards import Sample, decode_sample
from data_partition.shards.tar import read_tar


def fashion(config: DataConfig) -> Source:
    """8,000 images of Fashion-MNIST that come with this package; no download."""
    return Source(class_names=CLASS_NAMES, train=_packaged_fashion)


def fashion_full(config: DataConfig) -> Source:
    """All 60,000 training images of Fashion-MNIST; rows 0 to 4,999 of its test images are held out.

    Rows 5,000 to 9,999 are never read: they stay fit for checking that nothing was tuned to them.
    """
    folder = find_fashion(config.path)
    return Source(
        class_names=CLASS_NAMES,
        train=lambda: read_split(folder, "train", 60_000),
        test=lambda: read_split(folder, "t10k", HELD_OUT_ROWS),
    )


def digits(config: DataConfig) -> Source:
    """1,797 handwritten digits of 8 x 8 pixels, from scikit-learn."""
    return Source(class_names=tuple("0123456789"), train=_digits)


def image_folder(config: DataConfig) -> Source:
    """Any folder of images; the folders directly below it are the classes, in the order of their names."""
    root = tree_root(config.path)
    class_names = class_folders(root) if config.labels else ()
    return Source(class_names=class_names, train=lambda: read_tree(root, class_names))


def webdataset(config: DataConfig) -> Source:
    """Tars named by a brace-expanded path or URL, such as `s3://bucket/train-{0000..0099}.tar`."""
    return Source(class_names=(), train=lambda: read_urls(config.path))


def _packaged_fashion() -> Iterator[Sample]:
    for number in range(4):
        name = f"fashion-{number:04d}.tar.gz"
        with (files("data_partition") / "fashion" / name).open("rb") as file:
            for encoded in read_tar(file, name):
                yield decode_sample(encoded, name)


def _digits() -> Iterator[Sample]:
    found = load_digits()
    images = np.round(found.images * (255 / 16)).astype(np.uint8)
    for row, (image, label) in enumerate(zip(images, found.target, strict=True)):
        yield Sample(key=f"digits-{row:04d}", image=image[:, :, None], label=int(label))


SOURCES: dict[str, Callable[[DataConfig], Source]] = {
    "fashion": fashion,
    "fashion_full": fashion_full,
    "digits": digits,
    "image_folder": image_folder,
    "webdataset": webdataset,
}
