"""Samples in tar files in WebDataset layout; no other file uses webdataset or tarfile.

Nothing is extracted to the disk: samples are read into memory one at a time, none larger than `MAX_SAMPLE_BYTES`.
The openers and decoders of webdataset, which run commands and load pickles, are never called.
"""

import hashlib
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast
from urllib.parse import quote

from braceexpand import braceexpand

from data_partition.errors import ShardError
from data_partition.shards.untrusted import ByteStream, escape_unencodable, is_printable

READ_ERRORS = (ShardError, tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)
"""Errors that reading a broken tar can raise."""

MAX_SAMPLE_BYTES = 256 * 2**20
"""A sample whose files are larger in total is refused before they are read."""

MAX_NAME = 4096
"""A member with a longer name is refused."""


MEMBER = re.compile(r"((?:.*/)?[^/.]+)\.[^/]*", re.DOTALL)
"""The key of a file, up to the first dot of its name; hidden files and those without extension have none."""

MAX_KEY = 1024
"""A key of our own with more characters is shortened."""


@cache
def _webdataset() -> Any:
    """Import webdataset on first use: it imports torch, and reads `WDS_SECURE` while it is imported."""
    os.environ["WDS_SECURE"] = "1"
    return import_module("webdataset")


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """One sample as files: contents by extension (`png`, `cls`, …), all named `key` in the tar."""

    key: str
    files: dict[str, bytes]
    starts: dict[str, int] = field(default_factory=dict, compare=False)
    """Positions of the contents in the tar that they were read from."""


class StrictTarInfo(tarfile.TarInfo):
    """A tar header that must be intact; tarfile itself treats a damaged header as the end of the file."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "StrictTarInfo":
        """Parse a header of 512 bytes; raises `ShardError` if it is damaged, or if the member is too large."""
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise
            raise ShardError(f"the file ends too early or a header is damaged ({error})") from error
        check_size(header.name, header.size)
        return header


class TarWriter:
    """Writer of a tar whose bytes depend on the samples alone: no times, no user."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")
        self.tar = _webdataset().TarWriter(
            self.file, user="", group="", mode=0o644, mtime=0, encoder=False, compress=False
        )

    def add(self, sample: Encoded) -> None:
        """Append one sample."""
        self.tar.write({"__key__": sample.key, **sample.files})

    def close(self) -> None:
        """Write the end mark and close the file."""
        with self.file:
            self.tar.close()


def read_tar(file: ByteStream, name: str) -> Iterator[Encoded]:
    """Yield the samples of a tar, plain or compressed; a file that belongs to no sample is an `Encoded` without files.

    Every error of the tar is a `ShardError` that contains `name`; those of the stream are its own.
    """
    try:
        yield from group_members(iter_members(file))
    except READ_ERRORS as error:
        raise ShardError(
            f"shard {name} cannot be read: {error}; download or make it again, or remove it from the data set"
        ) from error


def group_members(members: Iterator[tuple[str, str | None, bytes, int]]) -> Iterator[Encoded]:
    """Group adjacent files with the same key; raises `ShardError` if a key occurs in two places."""
    places: dict[str, str] = {}
    sample: Encoded | None = None
    for path, key, data, start in members:
        if key is None:
            yield Encoded(key=path, files={})
            continue
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample
            if key in places:
                raise ShardError(
                    f"key {key!r} is in two places, at {places[key]!r} and at {path!r} after other samples; rename one "
                    "of two equal samples, or sort the tar so that the files of each sample are adjacent"
                )
            places[key] = path
            sample = Encoded(key=key, files={})
        extension = path[len(key) + 1 :].lower()
        if extension in sample.files:
            raise ShardError(f"{path!r} is a duplicate: sample {key!r} has two files .{extension}; rename one")
        sample.files[extension], sample.starts[extension] = data, start
    if sample is not None:
        yield sample


def iter_members(file: ByteStream) -> Iterator[tuple[str, str | None, bytes, int]]:
    """Yield name, key, content and its position of every file; skip folders.

    A key of None: the file belongs to no sample, and is not read.
    """
    current: str | None = ""
    total = 0
    with tarfile.open(fileobj=cast(IO[bytes], file), mode="r|*", tarinfo=StrictTarInfo) as tar:
        for member in tar:
            check_member(member)
            path = escape_unencodable(str(PurePosixPath(member.name)))
            match = MEMBER.fullmatch(path)
            key = match[1] if match else None
            content = tar.extractfile(member) if member.isreg() else None
            if content is not None and key is None:
                yield path, None, b"", 0
            elif content is not None:
                total = member.size + tarfile.BLOCKSIZE + (total if key == current else 0)
                current = key
                check_size(path, total)
                yield path, key, content.read(), member.offset_data
            tar.members = []  # type: ignore[attr-defined] # otherwise tarfile keeps every header in memory


def check_member(member: tarfile.TarInfo) -> None:
    """Raise `ShardError` unless a member is a plain file or folder whose name stays inside the tar."""
    path = PurePosixPath(member.name)
    if len(member.name) > MAX_NAME:
        raise ShardError(f"a member's name has {len(member.name)} characters, at most {MAX_NAME} are read")
    if path.is_absolute() or ".." in path.parts:
        raise ShardError(f"member {member.name!r} points outside its folder")
    if not is_printable(escape_unencodable(member.name)):
        raise ShardError(f"the name of member {member.name!r} has control characters")
    if member.issparse() or not (member.isreg() or member.isdir()):
        raise ShardError(f"member {member.name!r} is a link, a device or a file with holes; only plain files are read")


def check_size(name: str, size: int) -> None:
    """Raise `ShardError` if `size` bytes under one name exceed `MAX_SAMPLE_BYTES`."""
    if not 0 <= size <= MAX_SAMPLE_BYTES:
        raise ShardError(f"{name[:MAX_NAME]!r} claims {size} bytes, at most {MAX_SAMPLE_BYTES} a sample are read")


def quote_key(text: str | bytes) -> str:
    """Return a key that a tar can hold: ASCII, and without dots, which would end it; others for other texts.

    A long key ends with a hash, since quoted letters are longer than what `MAX_NAME` allows.
    """
    key = quote(text, safe="/").replace(".", "%2E")
    return key if len(key) <= MAX_KEY else f"{key[:MAX_KEY]}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def expand_urls(urls: str) -> list[str]:
    """Expand braces: `a-{0..2}.tar` becomes three names."""
    return list(braceexpand(urls))


def list_members(path: Path) -> Iterator[str]:
    """Yield the names of the files in a local tar, without reading their contents unless it is compressed.

    Raises `ShardError` that contains `path` if it is not a tar, or ends too early.
    """
    try:
        with tarfile.open(path, tarinfo=StrictTarInfo) as tar:
            yield from (member.name for member in tar if member.isreg())
    except READ_ERRORS as error:
        raise ShardError(f"shard {path} cannot be read: {error}; correct data.path, or make the tar again") from error
