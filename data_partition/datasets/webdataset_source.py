"""Images in WebDataset tars from any origin, local or remote, with a class, a caption, or neither."""

import json
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from urllib.parse import quote, urlsplit

from data_partition.datasets.source import Unreadable
from data_partition.errors import SourceMissing, SourceUnreachable, UnreadableImage
from data_partition.shards.images import FORMATS, decode_image
from data_partition.shards.shards import Sample
from data_partition.shards.tar import Encoded, expand_urls, read_tar
from data_partition.shards.untrusted import check_url, is_printable, open_url

IMAGE_EXTENSIONS = tuple(suffix.removeprefix(".") for kind in FORMATS.values() for suffix in kind)

MAX_CLASSES = 100_000
"""A larger class id is an error."""

MAX_ANNOTATION_BYTES = 2**20
"""A class, a caption or a `.json` in a larger file is an error."""

MAX_CAPTION = 10_000
"""A caption of more characters is an error."""


def read_urls(path: str | None) -> Iterator[Sample | Unreadable]:
    """Yield the samples of every tar at the brace-expanded `path`.

    Raises `SourceMissing`, `UrlRefused`, `SourceUnreachable` or `ShardError`.
    """
    urls = [check_url(url) for url in expand_urls(path)] if path else []
    if not urls:
        raise SourceMissing("data.path is empty; data.source=webdataset needs a path or URL of tars, braces allowed")
    for number, url in enumerate(urls):
        for encoded in read_url(url):
            yield parse_sample(encoded, number, url)


def read_url(url: str) -> Iterator[Encoded]:
    """Yield the samples of one tar, still encoded; raises `SourceUnreachable` or `ShardError`."""
    try:
        with open_url(url) as file:
            yield from read_tar(file, url)
    except (OSError, ImportError, ValueError) as error:
        reason = f"shard {url} cannot be opened: {error}; correct data.path or its credentials"
        raise SourceUnreachable(reason) from error


def parse_sample(encoded: Encoded, number: int, url: str) -> Sample | Unreadable:
    """Decode a sample and give it a key that is unique among all tars."""
    key = make_tar_key(number, url, encoded.key)
    extension = next((name for name in IMAGE_EXTENSIONS if name in encoded.files), None)
    if extension is None:
        return Unreadable(key=key, reason=f"no image among {sorted(encoded.files)}")
    try:
        label, caption = parse_annotation(encoded.files)
        return Sample(key=key, image=decode_image(encoded.files[extension]), label=label, caption=caption)
    except (UnreadableImage, ValueError, RecursionError) as error:
        return Unreadable(key=key, reason=str(error))


def make_tar_key(number: int, url: str, key: str) -> str:
    """Return the key of a sample in tar `number`, unique among all tars: ASCII without dots."""
    stem = PurePosixPath(urlsplit(url).path).name.split(".")[0]
    return quote(f"{number:05d}-{stem}/{key}", safe="/").replace(".", "%2E")


def parse_annotation(files: dict[str, bytes]) -> tuple[int, str]:
    """Return class (-1: none) and caption, from `.cls` and `.txt` if present, else from `.json`.

    Raises `ValueError`, with the reason, if they cannot be used.
    """
    if large := [name for name in ("cls", "json", "txt") if len(files.get(name, b"")) > MAX_ANNOTATION_BYTES]:
        raise ValueError(f"its .{large[0]} has {len(files[large[0]])} bytes, at most {MAX_ANNOTATION_BYTES} are read")
    fields = json.loads(files["json"]) if "json" in files else {}
    if not isinstance(fields, dict):
        raise ValueError("its .json is not an object")
    label = int(files["cls"] if "cls" in files else str(fields.get("label", fields.get("cls", -1))))
    caption = files["txt"].decode() if "txt" in files else str(fields.get("caption", ""))
    if not -1 <= label < MAX_CLASSES:
        raise ValueError(f"class {label} is not a number from 0 to {MAX_CLASSES - 1}")
    return label, normalize_caption(caption)


def normalize_caption(text: str) -> str:
    """Put the caption on one line; raises `ValueError` if it is too long or has characters that are not text."""
    caption = " ".join(re.split(r"[ \t\r\n]+", text.strip(" \t\r\n")))
    if not is_printable(caption):
        raise ValueError(f"its caption {caption[:50]!r} has control characters or halves of characters")
    if len(caption) > MAX_CAPTION:
        raise ValueError(f"its caption has {len(caption)} characters, at most {MAX_CAPTION} are read")
    return caption
