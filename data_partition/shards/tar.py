"""Samples in tar files, as webdataset lays them out: the one file that knows webdataset and tarfile.

Nothing is ever extracted: samples are read into memory one at a time, none larger than `MAX_SAMPLE_BYTES`.
webdataset's own openers and decoders, which run commands and pickles, are never called.
"""

import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, cast

from data_partition.errors import ShardError
from data_partition.shards.untrusted import ByteStream, is_showable, printable

os.environ["WDS_SECURE"] = "1"
import webdataset  # noqa: E402 - reads WDS_SECURE while it is imported

DAMAGE = (ShardError, tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)
"""What reading a broken tar can raise."""

MAX_SAMPLE_BYTES = 256 * 2**20
"""A sample whose files are larger together is refused before they are read."""

MAX_NAME = 4096
"""A member with a longer name is refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """One sample as files: contents by extension (`png`, `cls`, …), all named `key` in the tar."""

    key: str
    files: dict[str, bytes]


class StrictTarInfo(tarfile.TarInfo):
    """A tar header that must be whole; tarfile itself takes a damaged header for the end of the file."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "StrictTarInfo":
        """The header in these 512 bytes; raises `ShardError` if damaged, or if the member is too large."""
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise
            raise ShardError(f"it ends too early or a header is damaged ({error})") from error
        check_size(header.name, header.size)
        return header


class TarWriter:
    """Writes a tar whose bytes depend on the samples alone: no times, no user."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")
        self.tar = webdataset.TarWriter(
            self.file, user="", group="", mode=0o644, mtime=0, encoder=False, compress=False
        )

    def add(self, sample: Encoded) -> None:
        """Append one sample."""
        self.tar.write({"__key__": sample.key, **sample.files})

    def close(self) -> None:
        """Write the mark at the end and close the file."""
        with self.file:
            self.tar.close()


def read_tar(file: ByteStream, name: str) -> Iterator[Encoded]:
    """The samples of a tar, plain or compressed; every error is a `ShardError` that says `name`."""
    try:
        for found in webdataset.tariterators.group_by_keys(members(file, name)):
            files = {extension: data for extension, data in found.items() if not extension.startswith("__")}
            yield Encoded(key=found["__key__"], files=files)
    except DAMAGE as error:
        raise ShardError(
            f"shard {name} cannot be read: {error}; fetch or make it again, or leave it out of the data set"
        ) from error


def members(file: ByteStream, name: str) -> Iterator[dict[str, str | bytes]]:
    """Every file of a sample in webdataset's form; folders and files that belong to no sample are passed over."""
    current, total = "", 0
    with tarfile.open(fileobj=cast(IO[bytes], file), mode="r|*", tarinfo=StrictTarInfo) as tar:
        for member in tar:
            check_member(member)
            path = printable(str(PurePosixPath(member.name)))
            key = webdataset.tariterators.base_plus_ext(path)[0]
            content = tar.extractfile(member) if member.isreg() and key is not None else None
            if content is not None:
                total = member.size + tarfile.BLOCKSIZE + (total if key == current else 0)
                current = key
                check_size(path, total)
                yield {"fname": path, "data": content.read(), "__url__": name}
            tar.members = []  # type: ignore[attr-defined] # or it keeps every header


def check_member(member: tarfile.TarInfo) -> None:
    """Raise `ShardError` for whatever is neither a plain file nor a folder, or has a name that leads elsewhere."""
    path = PurePosixPath(member.name)
    if len(member.name) > MAX_NAME:
        raise ShardError(f"a member's name has {len(member.name)} characters, at most {MAX_NAME} are read")
    if path.is_absolute() or ".." in path.parts:
        raise ShardError(f"member {member.name!r} points out of its folder")
    if not is_showable(printable(member.name)):
        raise ShardError(f"the name of member {member.name!r} has control characters")
    if member.issparse() or not (member.isreg() or member.isdir()):
        raise ShardError(f"member {member.name!r} is a link, a device or a file with holes; only plain files are read")


def check_size(name: str, size: int) -> None:
    """Raise `ShardError` if so many bytes under one name are more than a sample can have."""
    if not 0 <= size <= MAX_SAMPLE_BYTES:
        raise ShardError(f"{name[:MAX_NAME]!r} claims {size} bytes, at most {MAX_SAMPLE_BYTES} a sample are read")


def expand_urls(urls: str) -> list[str]:
    """`a-{0..2}.tar` as the three names it stands for."""
    return [str(url) for url in webdataset.shardlists.expand_urls(urls)]
