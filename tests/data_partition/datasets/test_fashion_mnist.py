import gzip
import hashlib
import http.server
import struct
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data_partition.datasets import fashion_mnist
from data_partition.datasets.fashion_mnist import download_fashion, find_fashion, read_split
from data_partition.errors import DownloadFailed, ShardError, SourceMissing

ROWS = 7


def write_files(folder: Path, rows: int = ROWS) -> dict[str, str]:
    """Write four small files of the same format; return their checksums."""
    folder.mkdir(parents=True)
    for split in ("train", "t10k"):
        pixels = np.arange(rows * 784, dtype=np.uint32).astype(np.uint8).tobytes()
        images = struct.pack(">4I", 2051, rows, 28, 28) + pixels
        labels = struct.pack(">2I", 2049, rows) + bytes(range(rows))
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images, mtime=0))
        (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels, mtime=0))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "upstream"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_rows_are_read_in_order(tmp_path: Path):
    write_files(tmp_path / "f")
    samples = list(read_split(tmp_path / "f", "train", 3))
    assert [sample.key for sample in samples] == ["train-00000", "train-00001", "train-00002"]
    assert [sample.label for sample in samples] == [0, 1, 2]
    assert samples[1].image.reshape(-1)[:3].tolist() == [784 % 256, 785 % 256, 786 % 256]


def test_download_is_cached(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fashion_mnist, "SHA256", write_files(tmp_path / "upstream"))
    cache = download_fashion(server, tmp_path / "cache")
    assert len(list(read_split(cache, "t10k", ROWS))) == ROWS
    assert download_fashion("http://127.0.0.1:1", tmp_path / "cache") == cache


def test_download_with_wrong_checksum_raises_and_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wrong = dict.fromkeys(write_files(tmp_path / "upstream"), "0" * 64)
    monkeypatch.setattr(fashion_mnist, "SHA256", wrong)
    with pytest.raises(DownloadFailed, match="has SHA-256 .* expected 0000"):
        download_fashion((tmp_path / "upstream").as_uri(), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_download_of_large_file_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fashion_mnist, "SHA256", write_files(tmp_path / "upstream"))
    monkeypatch.setattr(fashion_mnist, "MAX_FILE_BYTES", 10)
    with pytest.raises(DownloadFailed, match="larger than 10 bytes"):
        download_fashion((tmp_path / "upstream").as_uri(), tmp_path / "cache")


def test_failed_download_error_names_the_remedy(tmp_path: Path):
    with pytest.raises(DownloadFailed, match="could not be downloaded.*dataset-fashion-mnist"):
        download_fashion("http://127.0.0.1:1", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_folder_without_all_files_raises(tmp_path: Path):
    with pytest.raises(SourceMissing, match="lacks train-images"):
        find_fashion(str(tmp_path))


def test_too_few_rows_or_truncation_raises(tmp_path: Path):
    write_files(tmp_path / "f")
    with pytest.raises(ShardError, match="not an IDX file of at least 8 rows"):
        list(read_split(tmp_path / "f", "train", 8))
    path = tmp_path / "f" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ShardError, match="cannot be read"):
        list(read_split(tmp_path / "f", "train", ROWS))
