"""A folder of images, whose subfolders may be classes; every file in it is read, or named with the reason why not."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_partition.config import DataConfig
from data_partition.datasets.captions import SIDECARS, TABLES, find_captions, read_table
from data_partition.datasets.source import Unreadable, is_dropping
from data_partition.errors import SourceMissing, UnprintableName, UnreadableImage
from data_partition.shards.decoded_images import IMAGES
from data_partition.shards.images import SUFFIXES
from data_partition.shards.shards import Sample
from data_partition.shards.tar import MAX_SAMPLE_BYTES, quote_key
from data_partition.shards.untrusted import is_printable, make_printable

UNREAD_IMAGES = (
    *(".heic", ".heif", ".jxl", ".jp2", ".j2k", ".jpx", ".svg", ".psd", ".tga", ".ico", ".exr", ".hdr"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".eps", ".pdf"),
)
CAPTION = "a caption"
ARCHIVES = (".tar", ".tgz", ".gz", ".zip", ".7z", ".rar", ".parquet", ".npz")
UNREADABLE_FILES = (PermissionError, FileNotFoundError)
"""Errors of one file; all others are of the disk, and a retry may help."""


def check_root(path: str | None) -> Path:
    """Return `data.path` as a folder; raises `SourceMissing` if it is not one."""
    if path is None or not Path(path).is_dir():
        raise SourceMissing(
            f"data.path={path} is not a folder; data.source=image_folder needs the folder of the images"
        )
    return Path(path)


def list_class_names(root: Path) -> tuple[str, ...]:
    """Return the sorted names of the folders below `root` that have images: class 0, 1, …; raises `UnprintableName`."""
    folders = (path for path in list_entries(root) if path.is_dir() and not path.name.startswith("."))
    names = tuple(path.name for path in folders if not path.is_symlink() and has_images(path, root.resolve()))
    if bad := [name for name in names if not is_printable(name)]:
        raise UnprintableName(
            f"class folder {bad[0]!r} in {root} has control characters or unencodable ones; rename it"
        )
    return names


def has_images(folder: Path, root: Path) -> bool:
    """Return whether there is an image file in a folder or below it."""
    return any(True for _ in iter_image_files(folder, root))


def iter_image_files(folder: Path, root: Path) -> Iterator[Path]:
    """Yield the image files of a folder by name; `root` is the folder that links must not leave, itself resolved."""
    return (found for found in iter_files(folder, folder, root) if isinstance(found, Path))


def read_image_tree(
    root: Path, class_names: tuple[str, ...], config: DataConfig | None = None
) -> Iterator[Sample | Unreadable]:
    """Yield every file below `root` in the order of its path; label -1 outside the folders of `class_names`."""
    return read_found(root, class_names, config, list_image_tree(root, class_names, config))


def read_found(
    root: Path, class_names: tuple[str, ...], config: DataConfig | None, found: Iterable[Path | Unreadable]
) -> Iterator[Sample | Unreadable]:
    """Read the images among what `list_image_tree` found."""
    label_of = {name: label for label, name in enumerate(class_names)}
    for entry in found:
        if isinstance(entry, Unreadable):
            yield entry
        else:
            parts = entry.relative_to(root).parts
            yield read_sample(entry, root, label_of.get(parts[0], -1) if len(parts) > 1 else -1, config)


def list_image_tree(
    root: Path, class_names: tuple[str, ...], config: DataConfig | None = None
) -> Iterator[Path | Unreadable]:
    """Yield the images below `root` in the order of their paths, and what is passed over."""
    read_table.cache_clear()
    folders: set[Path] = set()
    for found in iter_files(root, root, root.resolve()):
        if isinstance(found, Unreadable):
            if config is None or not config.captions or not found.reason.startswith(CAPTION):
                yield found
            continue
        folders.update(found.parents)
        yield found
    if config is not None and config.captions:
        for folder in sorted(folder for folder in folders if folder.is_relative_to(root)):
            named = (Path(f"{folder}/{name}") for name in read_table(folder, config.caption_key))
            absent = (path for path in named if not path.is_file())
            yield from (pass_over(path, root, "named by a table of captions, and not there") for path in absent)
    if class_names:
        yield from (empty_folder(path) for path in list_entries(root) if is_empty_class(path, class_names))


def is_empty_class(path: Path, class_names: tuple[str, ...]) -> bool:
    """Return whether a visible folder directly below the root has no images and so is no class."""
    return path.is_dir() and not path.is_symlink() and path.name[0] != "." and path.name not in class_names


def empty_folder(path: Path) -> Unreadable:
    """Return a folder as something that is not read."""
    return pass_over(path, path.parent, "a folder without images, which is no class")


def read_sample(path: Path, root: Path, label: int, config: DataConfig | None) -> Sample | Unreadable:
    """Read one image and, if they are configured, its caption."""
    key, name = make_key(path.relative_to(root)), display_name(path, root)
    try:
        data = read_image(path)
        decoded = IMAGES.decode(data)
        caption, more = find_captions(path, root, config) if config is not None and config.captions else ("", ())
    except (UnreadableImage, ValueError) as error:
        return Unreadable(key=key, reason=str(error), name=name)
    except UNREADABLE_FILES as error:
        return Unreadable(key=key, reason=f"it cannot be opened ({error.strerror})", name=name)
    return Sample(
        key=key,
        image=decoded.pixels,
        label=label,
        caption=caption,
        more_captions=more,
        name=name,
        remarks=decoded.remarks,
        source=(decoded.extension, data) if decoded.extension else None,
    )


def read_image(path: Path) -> bytes:
    """Read a plain file of at most `MAX_SAMPLE_BYTES`; raises `UnreadableImage` for anything else, such as a pipe."""
    if not path.is_file():
        raise UnreadableImage("it is not a plain file")
    if path.stat().st_size > MAX_SAMPLE_BYTES:
        raise UnreadableImage(f"it has {path.stat().st_size} bytes, at most {MAX_SAMPLE_BYTES} are read")
    return path.read_bytes()


def iter_files(folder: Path, top: Path, root: Path) -> Iterator[Path | Unreadable]:
    """Yield the image files of a folder by name, and what is passed over; `root` is `top` with links resolved."""
    entries = list_entries(folder)
    stems = {path.stem for path in entries if path.suffix.lower() in SUFFIXES}
    for path in entries:
        if path.name.startswith("."):
            yield pass_over(path, top, "hidden, by the dot before its name")
        elif not is_inside(path, root):
            yield pass_over(path, top, "a link out of the folder, in a circle or to nothing; copy the file instead")
        elif path.is_dir():
            if path.is_symlink():
                yield pass_over(path, top, "a link to another folder of the data set, which is read there")
            else:
                yield from iter_files(path, top, root)
        elif path.suffix.lower() in SUFFIXES:
            yield path
        else:
            yield pass_over(path, top, explain_suffix(path, stems))


def explain_suffix(path: Path, stems: set[str]) -> str:
    """Return why a file is not read as an image; `stems` are the names of the images beside it, without suffix."""
    suffix = path.suffix.lower()
    if path.name in TABLES or (suffix in SIDECARS and path.stem in stems):
        return f"{CAPTION}, which data.captions=true reads"
    if suffix in SIDECARS:
        return "no image has the name of this caption"
    if suffix in UNREAD_IMAGES:
        return f"{suffix} is not read; convert it to PNG or JPEG"
    if suffix in ARCHIVES:
        return f"{suffix} is an archive; unpack it (data=webdataset reads tars)"
    return f"not an image, by its suffix {make_printable(suffix)}" if suffix else "not an image: it has no suffix"


def pass_over(path: Path, top: Path, reason: str) -> Unreadable:
    """Return a file that is not read."""
    key, name = make_key(path.relative_to(top)), display_name(path, top)
    return Unreadable(key=key, reason=reason, name=name, is_image=False)


def is_inside(path: Path, root: Path) -> bool:
    """Return whether `path`, with links resolved, is below `root`."""
    try:
        return path.resolve(strict=True).is_relative_to(root)
    except (OSError, RuntimeError):
        return False


def list_entries(folder: Path) -> list[Path]:
    """Return the entries of a folder by name, without an operating system's own; raises `SourceMissing`."""
    try:
        entries = [path for path in folder.iterdir() if not is_dropping(path.name)]
    except PermissionError as error:
        raise SourceMissing(
            f"the folder {make_printable(str(folder))} may not be read ({error.strerror}); "
            "give this user the right, or take it out of data.path"
        ) from error
    return sorted(entries, key=lambda path: path.name)


def display_name(path: Path, top: Path) -> str:
    """Return a path below `top` for a person."""
    return make_printable(path.relative_to(top).as_posix())


def make_key(relative: Path) -> str:
    """Return a key for a tar; different paths get different keys."""
    return quote_key(os.fsencode(relative.as_posix()))
