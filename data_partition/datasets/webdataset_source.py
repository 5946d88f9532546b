"""Images in somebody else's tars, local or remote, with a class, a caption, or neither."""

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
from data_partition.shards.untrusted import check_url, is_showable, open_url

IMAGE_EXTENSIONS = tuple(suffix.removeprefix(".") for kind in FORMATS.values() for suffix in kind)

MAX_CLASSES = 100_000
"""A larger class id is taken for a mistake."""

MAX_ANNOTATION_BYTES = 2**20
"""A class, a caption or a `.json` in a larger file is taken for a mistake."""

MAX_CAPTION = 10_000
"""A caption of more characters is taken for a mistake."""


def read_urls(path: str | None) -> Iterator[Sample | Unreadable]:
    """The samples of every tar that the brace-expanded `path` names; raises `ShardError`, `UrlRefused`."""
    urls = [check_url(url) for url in expand_urls(path)] if path else []
    if not urls:
        raise SourceMissing("data.path is empty; data.source=webdataset needs a path or URL of tars, braces allowed")
    for number, url in enumerate(urls):
        for encoded in read_url(url):
            yield parse_sample(encoded, number, url)


def read_url(url: str) -> Iterator[Encoded]:
    """The samples of one tar, still encoded."""
    try:
        with open_url(url) as file:
            yield from read_tar(file, url)
    except (OSError, ImportError, ValueError) as error:
        reason = f"shard {url} cannot be opened: {error}; correct data.path or its credentials"
        raise SourceUnreachable(reason) from error


def parse_sample(encoded: Encoded, number: int, url: str) -> Sample | Unreadable:
    """A sample with a key that is unique among all tars."""
    stem = PurePosixPath(urlsplit(url).path).name.split(".")[0]
    key = quote(f"{number:05d}-{stem}/{encoded.key}", safe="/").replace(".", "%2E")
    extension = next((name for name in IMAGE_EXTENSIONS if name in encoded.files), None)
    if extension is None:
        return Unreadable(key=key, reason=f"no image among {sorted(encoded.files)}")
    try:
        label, caption = annotation(encoded.files)
        return Sample(key=key, image=decode_image(encoded.files[extension]), label=label, caption=caption)
    except (UnreadableImage, ValueError, RecursionError) as error:
        return Unreadable(key=key, reason=str(error))


def annotation(files: dict[str, bytes]) -> tuple[int, str]:
    """Class (-1: none) and caption: `.cls` and `.txt` where they are there, else what `.json` says."""
    if large := [name for name in ("cls", "json", "txt") if len(files.get(name, b"")) > MAX_ANNOTATION_BYTES]:
        raise ValueError(f"its .{large[0]} has {len(files[large[0]])} bytes, at most {MAX_ANNOTATION_BYTES} are read")
    found = json.loads(files["json"]) if "json" in files else {}
    if not isinstance(found, dict):
        raise ValueError("its .json is not an object")
    label = int(files["cls"] if "cls" in files else str(found.get("label", found.get("cls", -1))))
    caption = files["txt"].decode() if "txt" in files else str(found.get("caption", ""))
    if not -1 <= label < MAX_CLASSES:
        raise ValueError(f"class {label} is not a number from 0 to {MAX_CLASSES - 1}")
    return label, checked_caption(caption)


def checked_caption(text: str) -> str:
    """The caption on one line; raises `ValueError` if it is too long or holds characters that are not text."""
    caption = " ".join(re.split(r"[ \t\r\n]+", text.strip(" \t\r\n")))
    if not is_showable(caption):
        raise ValueError(f"its caption {caption[:50]!r} has control characters or halves of characters")
    if len(caption) > MAX_CAPTION:
        raise ValueError(f"its caption has {len(caption)} characters, at most {MAX_CAPTION} are read")
    return caption
