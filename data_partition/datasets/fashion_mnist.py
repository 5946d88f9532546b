"""Fashion-MNIST as its authors publish it: four gzipped IDX files, local or downloaded once.

Xiao, Rasul and Vollgraf 2017 (arXiv:1708.07747); MIT license, Copyright Zalando SE.
"""

import gzip
import hashlib
import logging
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_partition.errors import (
    AccessDenied,
    DownloadFailed,
    ShardError,
    SourceMissing,
    SourceUnreachable,
)
from data_partition.shards.shards import Sample
from data_partition.shards.urls import open_url

log = logging.getLogger(__name__)

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
HELD_OUT_ROWS = 5_000
"""Rows of the test images used as the reference for scores; the other half is never read."""

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
BASE_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
SHA256 = {
    "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}
"""Checksums of the authors' files. Debian's files hold the same data, compressed without the file name."""

REMEDY = "try again, install Debian's package dataset-fashion-mnist, or set data.path to the files' folder"
MAX_FILE_BYTES = 64 * 2**20
BLOCK_BYTES = 2**20
ROW_BYTES = 28 * 28


def find_fashion(path: str | None) -> Path:
    """Return the folder of the four files: `path`, Debian's, or the cache, into which they are downloaded once."""
    if path is not None:
        missing = [name for name in SHA256 if not (Path(path) / name).is_file()]
        if missing:
            raise SourceMissing(f"data.path={path} lacks {', '.join(missing)}; leave data.path out to download them")
        return Path(path)
    if all((DEBIAN_FOLDER / name).is_file() for name in SHA256):
        return DEBIAN_FOLDER
    return download_fashion(BASE_URL, cache_folder())


def cache_folder() -> Path:
    """Return the folder of downloads, below `$XDG_CACHE_HOME` or `~/.cache`."""
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "decentralized-diffusion" / "fashion-mnist"
    )


def download_fashion(base_url: str, folder: Path) -> Path:
    """Download those of the four files that `folder` lacks; each appears complete and verified, or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, digest in SHA256.items():
        if not (folder / name).is_file():
            download(f"{base_url}/{name}", folder / name, digest)
    return folder


def download(url: str, target: Path, digest: str) -> None:
    """Download one file whose SHA-256 must be `digest`; on failure raise `DownloadFailed` and remove all traces."""
    log.info("downloading %s", url)
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for block in fetch_blocks(url):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        with temporary.open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if actual != digest:
            raise DownloadFailed(f"{url} has SHA-256 {actual}, expected {digest}; {REMEDY}")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def fetch_blocks(url: str) -> Iterator[bytes]:
    """Yield the bytes at `url`, in order; raises `DownloadFailed` if there are too many or the download fails."""
    total = 0
    try:
        with open_url(url) as source:
            while block := source.read(BLOCK_BYTES):
                total += len(block)
                if total > MAX_FILE_BYTES:
                    raise DownloadFailed(f"{url} is larger than {MAX_FILE_BYTES} bytes; {REMEDY}")
                yield block
    except (SourceMissing, AccessDenied, SourceUnreachable) as error:
        raise DownloadFailed(f"{url} could not be downloaded ({error}); {REMEDY}") from error


def read_split(folder: Path, split: str, rows: int) -> Iterator[Sample]:
    """Yield the first `rows` samples of `train` or `t10k`; raises `ShardError` if a file is truncated."""
    images, labels = folder / f"{split}-images-idx3-ubyte.gz", folder / f"{split}-labels-idx1-ubyte.gz"
    try:
        with gzip.open(images) as image_file, gzip.open(labels) as label_file:
            check_header(images, image_file.read(16), (2051, 28, 28), rows)
            check_header(labels, label_file.read(8), (2049,), rows)
            for row in range(rows):
                image, label = image_file.read(ROW_BYTES), label_file.read(1)
                if len(image) < ROW_BYTES or not label:
                    raise EOFError(f"the file ends at row {row}")
                pixels = np.frombuffer(image, np.uint8).reshape(28, 28, 1)
                yield Sample(key=f"{split}-{row:05d}", image=pixels, label=label[0])
    except (OSError, EOFError) as error:
        raise ShardError(f"{images} or its labels cannot be read ({error}); download them again") from error


def check_header(path: Path, header: bytes, expected: tuple[int, ...], rows: int) -> None:
    """Raise `ShardError` unless an IDX header has this magic number, enough rows, and these axes."""
    numbers = struct.unpack(f">{len(header) // 4}I", header) if len(header) in (8, 16) else (0, 0)
    if (numbers[0], *numbers[2:]) != expected or numbers[1] < rows:
        raise ShardError(f"{path} is not an IDX file of at least {rows} rows: header {numbers}; download it again")
