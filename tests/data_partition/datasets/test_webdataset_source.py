import http.server
import json
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data_partition.datasets.source import Unreadable
from data_partition.datasets.webdataset_source import read_urls
from data_partition.errors import ShardError, SourceMissing, SourceUnreachable, UrlRefused
from data_partition.shards.images import encode_png
from data_partition.shards.shards import Sample
from tests.data_partition.shards.test_tar import tar_of

PNG = encode_png(np.zeros((4, 4, 1), dtype=np.uint8))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The test's folder, served on the loopback."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def write(path: Path, files: dict[str, bytes]) -> None:
    path.write_bytes(tar_of(files).getvalue())


@pytest.mark.parametrize(
    ("extra", "label", "caption"),
    [
        ({}, -1, ""),
        ({"x.cls": b"2"}, 2, ""),
        ({"x.json": b'{"label": 5, "caption": "a cat"}'}, 5, "a cat"),
        ({"x.json": b'{"cls": "7"}'}, 7, ""),
        ({"x.txt": b" a dog\n"}, -1, "a dog"),
        ({"x.cls": b"1", "x.txt": b"hat", "x.json": b'{"label": 9}'}, 1, "hat"),
    ],
)
def test_annotations(tmp_path: Path, extra: dict[str, bytes], label: int, caption: str):
    write(tmp_path / "a.tar", {"x.png": PNG} | extra)
    (found,) = read_urls(str(tmp_path / "a.tar"))
    assert isinstance(found, Sample)
    assert (found.label, found.caption) == (label, caption)


@pytest.mark.parametrize(
    "files",
    [
        {"x.png": b"no"},
        {"x.cls": b"1"},
        {"x.png": PNG, "x.cls": b"cat"},
        {"x.png": PNG, "x.cls": b"-2"},
        {"x.png": PNG, "x.json": b"[1]"},
        {"x.png": PNG, "x.json": b"{"},
        {"x.png": PNG, "x.json": json.dumps({"label": 10**9}).encode()},
        {"x.png": PNG, "x.txt": b"\xff"},
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, files: dict[str, bytes]):
    write(tmp_path / "a.tar", files)
    (found,) = read_urls(str(tmp_path / "a.tar"))
    assert isinstance(found, Unreadable)
    assert found.key == "00000-a/x"


def test_keys_are_unique_among_tars(tmp_path: Path):
    for name in ("a-0.tar", "a-1.tar"):
        write(tmp_path / name, {"x.png": PNG})
    found = [each.key for each in read_urls(str(tmp_path / "a-{0..1}.tar"))]
    assert found == ["00000-a-0/x", "00001-a-1/x"]


def test_tars_are_read_over_http(tmp_path: Path, server: str):
    write(tmp_path / "a.tar", {"x.png": PNG, "x.cls": b"3"})
    (found,) = read_urls(f"{server}/a.tar")
    assert isinstance(found, Sample)
    assert found.label == 3


def test_missing_refused_and_corrupt_are_clear(tmp_path: Path):
    with pytest.raises(SourceMissing, match="data.path is empty"):
        list(read_urls(None))
    with pytest.raises(UrlRefused):
        list(read_urls("{a,pipe:ls}.tar"))
    with pytest.raises(SourceUnreachable, match="none.tar cannot be opened"):
        list(read_urls(str(tmp_path / "none.tar")))
    (tmp_path / "a.tar").write_bytes(b"not a tar" * 200)
    with pytest.raises(ShardError, match="a.tar cannot be read"):
        list(read_urls(str(tmp_path / "a.tar")))
