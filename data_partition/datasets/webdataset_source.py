"""Images in WebDataset tars from any origin, local or remote, with a class, a caption, or neither."""

import contextlib
import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from data_partition.config import DataConfig
from data_partition.datasets.captions import MAX_ANNOTATION_BYTES, pick_captions, split_captions
from data_partition.datasets.source import Unreadable, is_dropping
from data_partition.errors import ShardError, SourceMissing, SourceUnreachable, UnreadableImage
from data_partition.shards.decoded_images import IMAGES
from data_partition.shards.images import SUFFIXES
from data_partition.shards.offset_index import ImagePlace, SourceTar, describe_tar, digest
from data_partition.shards.shards import MoreCaptions, Sample
from data_partition.shards.tar import Encoded, expand_urls, quote_key, read_tar
from data_partition.shards.untrusted import is_printable, make_printable
from data_partition.shards.urls import RETRY_AFTER_S, check_url, open_url
from ddm_core.url_queries import without_secrets

log = logging.getLogger(__name__)

IMAGE_EXTENSIONS = tuple(suffix.removeprefix(".") for suffix in SUFFIXES)

MAX_CLASSES = 100_000
"""A larger class id is an error."""

MAX_CLASS_NAME = 200
"""A class name of more characters is an error."""


def read_urls(path: str | None, config: DataConfig | None = None) -> Iterator[Sample | Unreadable]:
    """Yield the samples of every tar at the brace-expanded `path`; without `config` with classes and captions.

    Raises `SourceMissing`, `UrlRefused`, `AccessDenied`, `SourceUnreachable` or `ShardError`.
    """
    for numbered in enumerate(list_urls(path)):
        yield from read_numbered_tar(config or DataConfig(captions=True), numbered)


def read_numbered_tar(config: DataConfig, numbered: tuple[int, str]) -> Iterator[Sample | Unreadable]:
    """Yield the samples of one tar, whose number is in their keys; raises like `read_urls`."""
    number, url = numbered
    tar = describe_tar(url) if config.mode == "stream" else None
    for encoded in read_url(url):
        if encoded.files or not is_dropping(PurePosixPath(encoded.key).name):
            yield parse_sample(encoded, number, url, config, tar)


def list_urls(path: str | None) -> list[str]:
    """Return the URLs of a brace-expanded `path`; raises `SourceMissing`, `UrlRefused` or `ShardError`."""
    if not path:
        raise SourceMissing("data.path is empty; data.source=webdataset needs a path or URL of tars, braces allowed")
    try:
        urls = [path] if os.path.isfile(path) else expand_urls(path)  # noqa: PTH113 - a long list is no path
    except ValueError as error:
        raise SourceMissing(
            f"data.path={without_secrets(path)} has braces without their other half ({error}); "
            "write {000..099} or {a,b}, or the exact name of an existing file"
        ) from None
    if twice := [url for url, count in Counter(urls).items() if count > 1]:
        raise ShardError(f"data.path has {without_secrets(twice[0])} twice, and its samples too; name each tar once")
    return [check_url(url) for url in urls]


def read_url(url: str) -> Iterator[Encoded]:
    """Yield the samples of one tar, still encoded; opens it again, and skips what was yielded, if its server fails.

    Raises `SourceUnreachable` once `RETRY_AFTER_S` is used up, or at once another error of `open_url` and `read_tar`.
    """
    done = 0
    for wait_s in (*RETRY_AFTER_S, None):
        try:
            with open_url(url) as file:
                for number, encoded in enumerate(read_tar(file, without_secrets(url))):
                    if number == done:
                        done += 1
                        yield encoded
            return
        except SourceUnreachable as error:
            if wait_s is None:
                raise
            log.warning("%s; opened again in %.1f s", error, wait_s)
            time.sleep(wait_s)


def describe_annotations(path: str | None) -> str:
    """Return the files of the first sample of all, and the fields of its `.json`; raises like `read_url`."""
    for encoded in read_url(list_urls(path)[0]):
        fields: object = {}
        with contextlib.suppress(ValueError, RecursionError):
            fields = json.loads(read_annotation(encoded.files, "json")) if "json" in encoded.files else {}
        names = ", ".join(make_printable(str(name))[:50] for name in fields) if isinstance(fields, dict) else ""
        return f"its first sample has .{', .'.join(encoded.files)}" + (f" with the fields {names}" if names else "")
    return "it has no sample"


def parse_sample(
    encoded: Encoded, number: int, url: str, config: DataConfig, tar: SourceTar | None = None
) -> Sample | Unreadable:
    """Decode a sample and give it a key that is unique among all tars; with `tar`, say where its image is in it."""
    key = make_tar_key(number, url, encoded.key)
    name = make_printable(f"{tar_name(url)}: {encoded.key}")
    if not encoded.files:
        return Unreadable(key=key, reason="a file of no sample: it has no extension", name=name, is_image=False)
    images = [extension for extension in IMAGE_EXTENSIONS if extension in encoded.files]
    if not images:
        return Unreadable(key=key, reason=f"no image among {sorted(encoded.files)}", name=name)
    try:
        decoded = IMAGES.decode(encoded.files[images[0]])
        fields = read_fields(encoded.files, config)
        label, class_name = read_class(encoded.files, fields) if config.labels else (-1, "")
        caption, more = read_captions(encoded.files, fields, config) if config.captions else ("", ())
    except (UnreadableImage, ValueError, RecursionError) as error:
        return Unreadable(key=key, reason=make_printable(str(error)), name=name)
    content = encoded.files[images[0]]
    several = (f"several images in one sample, .{images[0]} is used",) if len(images) > 1 else ()
    return Sample(
        key=key,
        image=decoded.pixels,
        label=label,
        class_name=class_name,
        caption=caption,
        more_captions=more,
        name=name,
        remarks=(*several, *decoded.remarks),
        source=(decoded.extension, content) if decoded.extension else None,
        place=None if tar is None else ImagePlace(tar, encoded.starts[images[0]], len(content), digest(content)),
    )


def tar_name(url: str) -> str:
    """Return the file name of a tar."""
    return PurePosixPath(urlsplit(url).path).name


def make_tar_key(number: int, url: str, key: str) -> str:
    """Return the key of a sample in tar `number`, unique among all tars: ASCII without dots."""
    return quote_key(f"{number:05d}-{tar_name(url).split('.')[0]}/{key}")


def read_fields(files: dict[str, bytes], config: DataConfig) -> dict[str, object]:
    """Return the object in `.json` if something in it is needed; raises `ValueError` if it cannot be used."""
    needs_caption = config.captions and ("txt" not in files or config.more_captions or config.caption_key)
    if "json" not in files or not ((config.labels and "cls" not in files) or needs_caption):
        return {}
    fields = json.loads(read_annotation(files, "json"))
    if not isinstance(fields, dict):
        raise ValueError("its .json is not an object")  # noqa: TRY004 - a fault of the file, not of a type
    return fields


def read_annotation(files: dict[str, bytes], extension: str) -> str:
    """Return an annotation as text; raises `ValueError` if it is too large or not UTF-8."""
    if len(data := files[extension]) > MAX_ANNOTATION_BYTES:
        raise ValueError(f"its .{extension} has {len(data)} bytes, at most {MAX_ANNOTATION_BYTES} are read")
    return data.decode()


def read_class(files: dict[str, bytes], fields: dict[str, object]) -> tuple[int, str]:
    """Return a class as a number and "", or as -1 and a word; -1 and "" without one.

    Raises `ValueError` if it cannot be used.
    """
    value = read_annotation(files, "cls") if "cls" in files else fields.get("label", fields.get("cls"))
    if value is None:
        return -1, ""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"its class {str(value)[:50]!r} is neither a number nor a word")
    word = str(value).strip()
    if re.fullmatch(r"[+-]?[0-9]+", word):
        if not -1 <= (label := int(word)) < MAX_CLASSES:
            raise ValueError(f"class {label} is not a number from 0 to {MAX_CLASSES - 1}")
        return label, ""
    if not word or len(word) > MAX_CLASS_NAME or not is_printable(word):
        raise ValueError(f"its class {word[:50]!r} is empty, longer than {MAX_CLASS_NAME} or has control characters")
    return -1, word


def read_captions(files: dict[str, bytes], fields: dict[str, object], config: DataConfig) -> tuple[str, MoreCaptions]:
    """Return the captions in `.txt`, else in `.json`, and more of it; raises `ValueError` if one is unusable.

    The field that `data.caption_key` names comes before `.txt`.
    """
    caption, more = pick_captions(fields, config)
    if "txt" not in files or (config.caption_key is not None and caption):
        return caption, more
    first, others = split_captions(read_annotation(files, "txt"))
    return first, (*others, *more)
