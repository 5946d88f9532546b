"""Count a source by the names of its files: nothing is decoded, and nothing remote is opened."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

from data_partition.config import DataConfig
from data_partition.datasets.captions import check_captions
from data_partition.datasets.fashion_mnist import HELD_OUT_ROWS, find_fashion
from data_partition.datasets.image_folder import check_root, iter_image_files, list_class_names, make_key
from data_partition.datasets.parquet_source import check_caption_column, list_rows
from data_partition.datasets.source import is_held_out
from data_partition.datasets.webdataset_source import IMAGE_EXTENSIONS, list_urls, make_tar_key
from data_partition.errors import InvalidCaptions, NoSamples, SourceMissing
from data_partition.shards.tar import list_members

MAX_LISTED = 50_000
"""Samples after which the listing ends, so that it takes about a second."""

MAX_SHOWN = 5
"""Kinds of other files that a message names."""

Listed = tuple[str, str | None]
"""Key and class of a sample: an empty class is none, None is one that the names do not show."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """The counts of a source, as `build_dataset` would find them if every image is readable."""

    train: int
    held_out: int
    class_counts: Mapping[str, int]
    """Training samples of each class; empty if the names of the files do not show them."""
    unlabelled: tuple[str, ...] = ()
    """Keys of samples without a class."""
    is_complete: bool = True
    """Whether every sample is counted; otherwise the counts are lower bounds."""


def survey_source(config: DataConfig) -> Survey | None:
    """Count the samples of a source; None for remote ones.

    Raises `SourceMissing`, `NoSamples`, `InvalidCaptions`, `ShardError`, `UnprintableName` or `UrlRefused`.
    """
    if config.source == "fashion_full":
        if config.path is not None:
            find_fashion(config.path)
        return Survey(train=min(config.limit or 60_000, 60_000), held_out=HELD_OUT_ROWS, class_counts={})
    if config.source == "webdataset" and any("://" in url for url in list_urls(config.path)):
        return None
    try:
        survey = _count(config, *LISTINGS[config.source](config))
    except OSError as error:
        raise SourceMissing(f"data.path={config.path} cannot be read: {error.strerror}: {error.filename!r}") from error
    if survey.train + survey.held_out == 0:
        others = describe_tars(config) if config.source == "webdataset" else describe_others(Path(str(config.path)))
        raise NoSamples(f"data.path={config.path} has no image; {others}")
    if config.captions and config.source == "webdataset":
        _check_tars_have_captions(config, survey)
    if config.captions and config.source == "image_folder":
        root = check_root(config.path)
        check_captions(islice(iter_image_files(root, root.resolve()), MAX_LISTED), root, config)
    return survey


def _count(config: DataConfig, class_names: tuple[str, ...], samples: Iterator[Listed]) -> Survey:
    """Count in the order and up to the limit of `build_dataset`."""
    counts = dict.fromkeys(class_names, 0)
    train = held_out = 0
    names_show_classes = True
    unlabelled: list[str] = []
    for key, label in islice(samples, MAX_LISTED):
        if label == "":
            unlabelled.append(key)
        names_show_classes &= label is not None
        if is_held_out(key, config.holdout):
            held_out += 1
            continue
        train += 1
        if label:
            counts[label] = counts.get(label, 0) + 1
        if train == config.limit:
            break
    is_complete = train + held_out < MAX_LISTED
    return Survey(
        train=train,
        held_out=held_out,
        class_counts=counts if names_show_classes else {},
        unlabelled=tuple(unlabelled) if config.labels else (),
        is_complete=is_complete,
    )


def _list_image_folder(config: DataConfig) -> tuple[tuple[str, ...], Iterator[Listed]]:
    root = check_root(config.path)
    class_names = list_class_names(root) if config.labels else ()
    paths = (path.relative_to(root) for path in iter_image_files(root, root.resolve()))
    return class_names, ((make_key(path), path.parts[0] if len(path.parts) > 1 else "") for path in paths)


def _list_webdataset(config: DataConfig) -> tuple[tuple[str, ...], Iterator[Listed]]:
    urls = list_urls(config.path)
    if missing := [url for url in urls if not Path(url).is_file()]:
        raise SourceMissing(
            f"{len(missing)} of {len(urls)} tars of data.path are missing, the first is {missing[0]}; correct data.path"
        )
    return (), (sample for number, url in enumerate(urls) for sample in _list_tar(number, url))


def _list_tar(number: int, url: str) -> Iterator[Listed]:
    """Yield the samples of a tar: consecutive files with one stem, one of them an image."""
    current, extensions = "", set[str]()
    for name in (*list_members(Path(url)), ""):
        path = PurePosixPath(name)
        stem, _, extension = path.name.partition(".")
        key = str(path.with_name(stem)) if stem else ""
        if key != current:
            if extensions & set(IMAGE_EXTENSIONS):
                yield make_tar_key(number, url, current), None if extensions & {"cls", "json"} else ""
            current, extensions = key, set()
        extensions.add(extension.lower())


def _list_parquet(config: DataConfig) -> tuple[tuple[str, ...], Iterator[Listed]]:
    if config.captions:
        check_caption_column(config)
    return (), iter(list_rows(config.path))


def describe_others(root: Path) -> str:
    """Return what a folder holds instead of images, and what to do."""
    files = (name for _, _, names in os.walk(root) for name in names)
    suffixes = Counter(Path(name).suffix or "no suffix" for name in islice(files, MAX_LISTED))
    if not suffixes:
        return "it holds no file at all; correct the path"
    found = ", ".join(f"{count} with {suffix}" for suffix, count in suffixes.most_common(MAX_SHOWN))
    return f"it holds other files: {found}; correct the path, or convert them"


def describe_tars(config: DataConfig) -> str:
    """Return what local tars hold instead of images, and what to do."""
    extensions = _count_extensions(config)
    if not extensions:
        return "its tars hold no file at all; correct the path"
    return (
        f"its tars hold {_name_extensions(extensions)}; a sample is x.png, x.jpg, x.webp or another image, with x.cls, "
        "x.txt or x.json beside it: make the tars again"
    )


def _check_tars_have_captions(config: DataConfig, survey: Survey) -> None:
    """Raise `InvalidCaptions` if no file of local tars, all of which are listed, can hold a caption."""
    if survey.is_complete and not (extensions := _count_extensions(config)).keys() & {"txt", "json"}:
        raise InvalidCaptions(
            f"data.captions=true, and the tars of data.path hold {_name_extensions(extensions)}: captions are in .txt, "
            "or in a field of .json; add them, or set data.captions=false"
        )


def _count_extensions(config: DataConfig) -> Counter[str]:
    """Return how many files of each extension local tars hold."""
    members = (PurePosixPath(name).name for url in list_urls(config.path) for name in list_members(Path(url)))
    return Counter(name.partition(".")[2].lower() for name in islice(members, 4 * MAX_LISTED))


def _name_extensions(extensions: Counter[str]) -> str:
    return ", ".join(f"{count} with .{extension}" for extension, count in extensions.most_common(MAX_SHOWN))


LISTINGS = {
    "fashion": lambda config: ((), ((f"train-{row:05d}", None) for row in range(8_000))),
    "emoji": lambda config: ((), ((f"emoji-{row // 2:04d}", None) for row in range(3_812))),
    "digits": lambda config: ((), ((f"digits-{row:04d}", None) for row in range(1_797))),
    "image_folder": _list_image_folder,
    "webdataset": _list_webdataset,
    "parquet": _list_parquet,
}
"""Classes and samples of each source, in the order of `SOURCES`."""
