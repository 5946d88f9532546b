"""A folder of images, whose sub-folders may be classes."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from data_partition.datasets.source import Unreadable
from data_partition.errors import SourceMissing, UnprintableName, UnreadableImage
from data_partition.shards.images import FORMATS, decode_image
from data_partition.shards.shards import Sample
from data_partition.shards.tar import MAX_SAMPLE_BYTES
from data_partition.shards.untrusted import is_showable

log = logging.getLogger(__name__)


def tree_root(path: str | None) -> Path:
    """The folder `data.path`; raises `SourceMissing` if there is none."""
    if path is None or not Path(path).is_dir():
        raise SourceMissing(
            f"data.path={path} is not a folder; data.source=image_folder needs the folder of the images"
        )
    return Path(path)


def class_folders(root: Path) -> tuple[str, ...]:
    """Names of the folders directly below `root`, sorted: class 0, 1, …; raises `UnprintableName`."""
    names = tuple(path.name for path in visible(root) if path.is_dir())
    if bad := [name for name in names if not is_showable(name)]:
        raise UnprintableName(f"class folder {bad[0]!r} in {root} has characters that cannot be shown; rename it")
    return names


def read_tree(root: Path, class_names: tuple[str, ...]) -> Iterator[Sample | Unreadable]:
    """Every image below `root` in the order of its path; label -1 outside the folders of `class_names`."""
    label_of = {name: label for label, name in enumerate(class_names)}
    for path in image_files(root, root.resolve()):
        relative = path.relative_to(root)
        key = key_of(relative)
        label = label_of.get(relative.parts[0], -1) if len(relative.parts) > 1 else -1
        try:
            yield Sample(key=key, image=decode_image(read_image(path)), label=label)
        except (UnreadableImage, OSError) as error:
            yield Unreadable(key=key, reason=str(error))


def read_image(path: Path) -> bytes:
    """The bytes of a plain file of bearable size; raises `UnreadableImage` for anything else, a pipe for example."""
    if not path.is_file():
        raise UnreadableImage("it is no plain file")
    if path.stat().st_size > MAX_SAMPLE_BYTES:
        raise UnreadableImage(f"it has {path.stat().st_size} bytes, at most {MAX_SAMPLE_BYTES} are read")
    return path.read_bytes()


def image_files(folder: Path, root: Path) -> Iterator[Path]:
    """Files with an image's extension, sorted; links that lead out of `root` are passed over and logged."""
    suffixes = {suffix for kind in FORMATS.values() for suffix in kind}
    for path in visible(folder):
        if not leads_inside(path, root):
            log.warning("%r leads out of the image folder, or in a circle, and is not followed", str(path))
        elif path.is_dir():
            if not path.is_symlink():
                yield from image_files(path, root)
        elif path.suffix.lower() in suffixes:
            yield path


def leads_inside(path: Path, root: Path) -> bool:
    """Whether what `path` stands for lies below `root`."""
    try:
        return path.resolve(strict=True).is_relative_to(root)
    except (OSError, RuntimeError):
        return False


def visible(folder: Path) -> list[Path]:
    """What a folder holds, hidden names left out, sorted by name."""
    return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=lambda path: path.name)


def key_of(relative: Path) -> str:
    """A key for a tar: ASCII without dots, which would end it; different paths have different keys."""
    return quote(os.fsencode(relative.as_posix()), safe="/").replace(".", "%2E")
