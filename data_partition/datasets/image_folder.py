"""A folder of images, whose subfolders may be classes."""

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
from data_partition.shards.untrusted import is_printable

log = logging.getLogger(__name__)


def check_root(path: str | None) -> Path:
    """Return `data.path` as a folder; raises `SourceMissing` if it is not one."""
    if path is None or not Path(path).is_dir():
        raise SourceMissing(
            f"data.path={path} is not a folder; data.source=image_folder needs the folder of the images"
        )
    return Path(path)


def list_class_names(root: Path) -> tuple[str, ...]:
    """Return the sorted names of the folders directly below `root`: class 0, 1, …; raises `UnprintableName`."""
    names = tuple(path.name for path in list_visible(root) if path.is_dir())
    if bad := [name for name in names if not is_printable(name)]:
        raise UnprintableName(
            f"class folder {bad[0]!r} in {root} has control characters or unencodable ones; rename it"
        )
    return names


def read_image_tree(root: Path, class_names: tuple[str, ...]) -> Iterator[Sample | Unreadable]:
    """Yield every image below `root` in the order of its path; label -1 outside the folders of `class_names`."""
    label_of = {name: label for label, name in enumerate(class_names)}
    for path in iter_image_files(root, root.resolve()):
        relative = path.relative_to(root)
        key = make_key(relative)
        label = label_of.get(relative.parts[0], -1) if len(relative.parts) > 1 else -1
        try:
            yield Sample(key=key, image=decode_image(read_image(path)), label=label)
        except (UnreadableImage, OSError) as error:
            yield Unreadable(key=key, reason=str(error))


def read_image(path: Path) -> bytes:
    """Read a plain file of at most `MAX_SAMPLE_BYTES`; raises `UnreadableImage` for anything else, such as a pipe."""
    if not path.is_file():
        raise UnreadableImage("it is not a plain file")
    if path.stat().st_size > MAX_SAMPLE_BYTES:
        raise UnreadableImage(f"it has {path.stat().st_size} bytes, at most {MAX_SAMPLE_BYTES} are read")
    return path.read_bytes()


def iter_image_files(folder: Path, root: Path) -> Iterator[Path]:
    """Yield files with an image extension, sorted; skip and log links that point outside `root`."""
    suffixes = {suffix for kind in FORMATS.values() for suffix in kind}
    for path in list_visible(folder):
        if not is_inside(path, root):
            log.warning("%r points outside the image folder, or in a circle, and is not followed", str(path))
        elif path.is_dir():
            if not path.is_symlink():
                yield from iter_image_files(path, root)
        elif path.suffix.lower() in suffixes:
            yield path


def is_inside(path: Path, root: Path) -> bool:
    """Return whether `path`, with links resolved, is below `root`."""
    try:
        return path.resolve(strict=True).is_relative_to(root)
    except (OSError, RuntimeError):
        return False


def list_visible(folder: Path) -> list[Path]:
    """Return the entries of a folder, without hidden ones, sorted by name."""
    return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=lambda path: path.name)


def make_key(relative: Path) -> str:
    """Return a key for a tar: ASCII without dots, which would end it; different paths get different keys."""
    return quote(os.fsencode(relative.as_posix()), safe="/").replace(".", "%2E")
