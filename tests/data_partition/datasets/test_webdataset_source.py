import http.server
import json
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data_partition.config import DataConfig
from data_partition.datasets.source import Unreadable
from data_partition.datasets.webdataset_source import read_urls
from data_partition.errors import ShardError, SourceMissing, UrlRefused
from data_partition.shards.images import encode_png
from data_partition.shards.shards import Sample
from tests.data_partition.shards.test_tar import make_tar

PNG = encode_png(np.zeros((4, 4, 1), dtype=np.uint8))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Serve the test's folder on the loopback interface."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def write(path: Path, files: dict[str, bytes]) -> None:
    path.write_bytes(make_tar(files).getvalue())


@pytest.mark.parametrize(
    ("extra", "label", "caption"),
    [
        ({}, -1, ""),
        ({"x.cls": b" -1\n"}, -1, ""),
        ({"x.json": b'{"label": null, "caption": null}'}, -1, ""),
        ({"x.json": b'{"text": "a hat"}'}, -1, "a hat"),
        ({"x.cls": b"2"}, 2, ""),
        ({"x.json": b'{"label": 5, "caption": "a cat"}'}, 5, "a cat"),
        ({"x.json": b'{"cls": "7"}'}, 7, ""),
        ({"x.txt": b" a dog\na hound\n"}, -1, "a dog"),
        ({"x.cls": b"1", "x.txt": b"hat", "x.json": b'{"label": 9}'}, 1, "hat"),
    ],
)
def test_class_and_caption_are_parsed(tmp_path: Path, extra: dict[str, bytes], label: int, caption: str):
    write(tmp_path / "a.tar", {"x.png": PNG} | extra)
    (sample,) = read_urls(str(tmp_path / "a.tar"))
    assert isinstance(sample, Sample)
    assert (sample.label, sample.caption) == (label, caption)


@pytest.mark.parametrize(("key", "caption"), [(None, "hat"), ("long", "a felt hat"), ("short", "hat")])
def test_named_field_comes_before_the_text(tmp_path: Path, key: str | None, caption: str):
    write(tmp_path / "a.tar", {"x.png": PNG, "x.txt": b"hat", "x.json": b'{"long": "a felt hat", "text": "other"}'})
    config = DataConfig(source="webdataset", path=str(tmp_path / "a.tar"), captions=True, caption_key=key, labels=False)
    (sample,) = read_urls(str(tmp_path / "a.tar"), config)
    assert isinstance(sample, Sample) and sample.caption == caption


@pytest.mark.parametrize(
    "files",
    [
        {"x.png": b"no"},
        {"x.cls": b"1"},
        {"x.png": PNG, "x.cls": b"\x1b[31m"},
        {"x.png": PNG, "x.cls": b"c" * 201},
        {"x.png": PNG, "x.json": b'{"label": true}'},
        {"x.png": PNG, "x.json": b'{"label": [1]}'},
        {"x.png": PNG, "x.json": b'{"caption": 3}'},
        {"x.png": PNG, "x.cls": b"-2"},
        {"x.png": PNG, "x.json": b"[1]"},
        {"x.png": PNG, "x.json": b"{"},
        {"x.png": PNG, "x.json": json.dumps({"label": 10**9}).encode()},
        {"x.png": PNG, "x.txt": b"\xff"},
    ],
)
def test_unreadable_sample_keeps_its_key(tmp_path: Path, files: dict[str, bytes]):
    write(tmp_path / "a.tar", files)
    (sample,) = read_urls(str(tmp_path / "a.tar"))
    assert isinstance(sample, Unreadable)
    assert sample.key == "00000-a/x"


def test_keys_are_unique_among_tars(tmp_path: Path):
    for name in ("a-0.tar", "a-1.tar"):
        write(tmp_path / name, {"x.png": PNG})
    keys = [sample.key for sample in read_urls(str(tmp_path / "a-{0..1}.tar"))]
    assert keys == ["00000-a-0/x", "00001-a-1/x"]


def test_tars_are_read_over_http(tmp_path: Path, server: str):
    write(tmp_path / "a.tar", {"x.png": PNG, "x.cls": b"3"})
    (sample,) = read_urls(f"{server}/a.tar")
    assert isinstance(sample, Sample)
    assert sample.label == 3


def test_missing_refused_and_corrupt_tars_raise(tmp_path: Path):
    with pytest.raises(SourceMissing, match="data.path is empty"):
        list(read_urls(None))
    with pytest.raises(UrlRefused):
        list(read_urls("{a,pipe:ls}.tar"))
    with pytest.raises(SourceMissing, match="none.tar does not exist; correct data.path"):
        list(read_urls(str(tmp_path / "none.tar")))
    with pytest.raises(SourceMissing, match="is a folder; give the tars in it"):
        list(read_urls(str(tmp_path)))
    (tmp_path / "a.tar").write_bytes(b"not a tar" * 200)
    with pytest.raises(ShardError, match="a.tar cannot be read"):
        list(read_urls(str(tmp_path / "a.tar")))


def test_annotations_that_nobody_asked_for_are_not_parsed(tmp_path: Path):
    write(tmp_path / "a.tar", {"x.png": PNG, "x.cls": b"\xff", "x.json": b"{", "x.txt": b"\x1b"})
    (sample,) = read_urls(str(tmp_path / "a.tar"), DataConfig(labels=False))
    assert isinstance(sample, Sample)
    assert (sample.label, sample.class_name, sample.caption) == (-1, "", "")


@pytest.mark.parametrize("place", ["cls", "json"])
def test_words_are_classes(tmp_path: Path, place: str):
    data = b" tiger cat\n" if place == "cls" else b'{"label": "tiger cat"}'
    write(tmp_path / "a.tar", {"x.png": PNG, f"x.{place}": data})
    (sample,) = read_urls(str(tmp_path / "a.tar"))
    assert isinstance(sample, Sample)
    assert (sample.label, sample.class_name) == (-1, "tiger cat")


def test_second_image_and_stray_files_are_said(tmp_path: Path):
    write(tmp_path / "a.tar", {"LICENSE": b"", "._x.png": b"", "x.JPG": PNG, "x.png": PNG, "y.heic": PNG})
    stray, sample, other = read_urls(str(tmp_path / "a.tar"))
    assert isinstance(stray, Unreadable) and not stray.is_image and stray.name == "a.tar: LICENSE"
    assert isinstance(sample, Sample) and sample.remarks == ("several images in one sample, .png is used",)
    assert isinstance(other, Unreadable) and other.reason == "no image among ['heic']"


def test_braces_without_their_other_half(tmp_path: Path):
    write(tmp_path / "a{b.tar", {"x.png": PNG})
    (sample,) = read_urls(str(tmp_path / "a{b.tar"))
    assert isinstance(sample, Sample)
    with pytest.raises(SourceMissing, match="braces without their other half.*or the exact name"):
        list(read_urls(str(tmp_path / "c{b.tar")))


def test_list_that_is_longer_than_a_path_is_expanded(tmp_path: Path):
    for number in range(90):
        write(tmp_path / f"{number:03d}.tar", {"x.png": PNG})
    names = ",".join(f"{number:03d}" for number in range(90))
    assert len(list(read_urls(f"{tmp_path}/{{{names}}}.tar"))) == 90


def test_tar_that_is_listed_twice_raises(tmp_path: Path):
    write(tmp_path / "a.tar", {"x.png": PNG})
    with pytest.raises(ShardError, match="a.tar twice"):
        list(read_urls(f"{tmp_path}/{{a,a}}.tar"))
