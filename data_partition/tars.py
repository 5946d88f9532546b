"""Samples in tar files, as webdataset lays them out: the one file that knows webdataset and tarfile.

Nothing is ever extracted: members are read into memory one at a time, none larger than `MAX_MEMBER_BYTES`.
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
from data_partition.urls import ByteStream

os.environ["WDS_SECURE"] = "1"
import webdataset  # noqa: E402 - reads WDS_SECURE while it is imported

DAMAGE = (ShardError, tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)
"""What reading a broken tar can raise."""

MAX_MEMBER_BYTES = 256 * 2**20
"""A larger member is refused before it is read."""


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
        if header.size > MAX_MEMBER_BYTES:
            raise ShardError(f"member {header.name!r} has {header.size} bytes, at most {MAX_MEMBER_BYTES} are read")
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
        self.tar.close()
        self.file.close()


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
    """Every regular file of a tar in webdataset's form; directories and links are passed over."""
    with tarfile.open(fileobj=cast(IO[bytes], file), mode="r|*", tarinfo=StrictTarInfo) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if path.is_absolute() or ".." in path.parts:
                raise ShardError(f"member {member.name!r} points out of its folder")
            content = tar.extractfile(member) if member.isreg() else None
            if content is not None:
                yield {"fname": str(path), "data": content.read(), "__url__": name}
            tar.members = []  # type: ignore[attr-defined] # or it keeps every header


def expand_urls(urls: str) -> list[str]:
    """`a-{0..2}.tar` as the three names it stands for."""
    return [str(url) for url in webdataset.shardlists.expand_urls(urls)]
