"""A folder of images, whose sub-folders may be classes."""

import logging
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from data_partition.errors import SourceMissing, UnreadableImage
from data_partition.images import FORMATS, decode_image
from data_partition.shards import Sample
from data_partition.source import Unreadable

log = logging.getLogger(__name__)


def tree_root(path: str | None) -> Path:
    """The folder `data.path`; raises `SourceMissing` if there is none."""
    if path is None or not Path(path).is_dir():
        raise SourceMissing(
            f"data.path={path} is not a folder; data.source=image_folder needs the folder of the images"
        )
    return Path(path)


def class_folders(root: Path) -> tuple[str, ...]:
    """Names of the folders directly below `root`, sorted: class 0, 1, …"""
    return tuple(path.name for path in visible(root) if path.is_dir())


def read_tree(root: Path, class_names: tuple[str, ...]) -> Iterator[Sample | Unreadable]:
    """Every image below `root` in the order of its path; label -1 outside the folders of `class_names`."""
    label_of = {name: label for label, name in enumerate(class_names)}
    for path in image_files(root, root.resolve()):
        relative = path.relative_to(root)
        key = key_of(relative)
        label = label_of.get(relative.parts[0], -1) if len(relative.parts) > 1 else -1
        try:
            yield Sample(key=key, image=decode_image(path.read_bytes()), label=label)
        except (UnreadableImage, OSError) as error:
            yield Unreadable(key=key, reason=str(error))


def image_files(folder: Path, root: Path) -> Iterator[Path]:
    """Files with an image's extension, sorted; links that lead out of `root` are passed over and logged."""
    suffixes = {suffix for kind in FORMATS.values() for suffix in kind}
    for path in visible(folder):
        if not path.resolve().is_relative_to(root):
            log.warning("%s leads out of the image folder and is not followed", path)
        elif path.is_dir():
            if not path.is_symlink():
                yield from image_files(path, root)
        elif path.suffix.lower() in suffixes:
            yield path


def visible(folder: Path) -> list[Path]:
    """What a folder holds, hidden names left out, sorted by name."""
    return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=lambda path: path.name)


def key_of(relative: Path) -> str:
    """A key for a tar: ASCII without dots, which would end it; different paths have different keys."""
    return quote(relative.as_posix(), safe="/").replace(".", "%2E")
