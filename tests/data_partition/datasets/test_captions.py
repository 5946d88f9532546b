"""Captions beside images, in files of their own or in a table as Hugging Face's image folders have it."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_partition.config import DataConfig
from data_partition.datasets.captions import MAX_CAPTION, find_captions, normalize_caption, read_table
from data_partition.datasets.image_folder import read_image_tree
from data_partition.datasets.source import Unreadable
from data_partition.datasets.survey import survey_source
from data_partition.errors import InvalidCaptions
from data_partition.shards.shards import Sample
from data_partition.shards.untrusted import is_printable
from tests.data_partition.datasets.test_image_folder import write

CAPTIONED = DataConfig(source="image_folder", path="/", labels=False, captions=True)


@pytest.fixture(autouse=True)
def _forget_tables():
    read_table.cache_clear()


def write_table(folder: Path, kind: str, rows: list[dict[str, str | None]]) -> None:
    path = folder / f"metadata.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows), encoding="utf-8")
    elif kind == "csv":
        lines = [",".join(rows[0]), *(",".join(f'"{value or ""}"' for value in row.values()) for row in rows)]
        path.write_text("\n".join(lines), encoding="utf-8")
    else:
        pytest.importorskip("pyarrow")
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(rows), path)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("column", ["text", "caption"])
def test_table_gives_captions_by_file_name(tmp_path: Path, kind: str, column: str):
    for name in ("a/x.png", "a/y.png", "b/z.png"):
        write(tmp_path / name)
    rows = [{"file_name": "a/x.png", column: "one, two"}, {"file_name": "b/z.png", column: "猫"}]
    write_table(tmp_path, kind, rows)
    samples = list(read_image_tree(tmp_path, (), CAPTIONED))
    assert [(sample.name, sample.caption) for sample in samples if isinstance(sample, Sample)] == [
        ("a/x.png", "one, two"),
        ("a/y.png", ""),
        ("b/z.png", "猫"),
    ]
    assert len(samples) == 3


def test_nearest_caption_is_used(tmp_path: Path):
    for name in ("a/x.png", "a/y.png", "a/z.png"):
        write(tmp_path / name)
    write_table(tmp_path, "jsonl", [{"file_name": f"a/{name}.png", "text": "far"} for name in "xyz"])
    write_table(tmp_path / "a", "jsonl", [{"file_name": f"{name}.png", "text": "near"} for name in "xy"])
    (tmp_path / "a" / "x.caption").write_text("beside")
    found = [find_captions(tmp_path / "a" / f"{name}.png", tmp_path, CAPTIONED)[0] for name in "xyz"]
    assert found == ["beside", "near", "far"]


def test_row_without_its_image_is_named(tmp_path: Path):
    write(tmp_path / "a" / "x.png")
    names = ("a/x.png", "a/y.png", "/z.png", "../\x00.png")
    write_table(tmp_path, "jsonl", [{"file_name": name, "text": "far"} for name in names])
    samples = list(read_image_tree(tmp_path, (), CAPTIONED))
    assert [sample.name for sample in samples if isinstance(sample, Sample)] == ["a/x.png"]
    absent = [sample for sample in samples if isinstance(sample, Unreadable)]
    assert [note.name for note in absent] == ["a/y.png", "z.png", "../\\x00.png"] and "not there" in absent[0].reason


def test_key_of_the_caption_is_configured(tmp_path: Path):
    write_table(tmp_path, "jsonl", [{"file_name": "x.png", "text": "long", "short": "brief"}])
    config = dataclasses.replace(CAPTIONED, caption_key="short", more_captions={"text": 0.5, "absent": 2})
    assert find_captions(tmp_path / "x.png", tmp_path, config) == ("brief", (("long", 0.5),))
    (tmp_path / "x.txt").write_text("beside")
    assert find_captions(tmp_path / "x.png", tmp_path, config)[0] == "brief"
    assert find_captions(tmp_path / "x.png", tmp_path, CAPTIONED)[0] == "beside"
    (tmp_path / "y.txt").write_text("beside")
    assert find_captions(tmp_path / "y.png", tmp_path, config)[0] == "beside"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", b"{\n", "metadata.jsonl cannot be used: "),
        ("metadata.jsonl", b"[1]\n", "is not an object"),
        ("metadata.jsonl", b'{"file": "x.png", "text": "a"}\n', "has the columns file, text, but needs file_name"),
        ("metadata.jsonl", b'{"file_name": "x.png", "title": "a"}\n', "but needs file_name and caption or text"),
        ("metadata.jsonl", b'{"file_name": "x.png", "text": 3}\n', "its caption 'text' is a int"),
        ("metadata.jsonl", b"\xff\n", "it is not UTF-8; correct it"),
        ("metadata.csv", b"file_name,label\nx.png,3\n", "has the columns file_name, label"),
        ("metadata.parquet", b"not parquet", "metadata.parquet cannot be used"),
    ],
)
def test_table_that_cannot_be_used_is_named(tmp_path: Path, name: str, content: bytes, message: str):
    write(tmp_path / "x.png")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidCaptions, match=message):
        list(read_image_tree(tmp_path, (), CAPTIONED))


def test_table_of_a_spreadsheet_may_begin_with_a_byte_order_mark(tmp_path: Path):
    write(tmp_path / "x.png")
    (tmp_path / "metadata.csv").write_bytes(b"\xef\xbb\xbffile_name,text\nx.png,a duck\n")
    assert find_captions(tmp_path / "x.png", tmp_path, CAPTIONED) == ("a duck", ())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"none of 2 images has a caption: a caption of x\.jpg is in x\.txt beside it"),
        ({"x.txt": b"", "y.txt": b" \t\n\n"}, "none of 2 images has a caption: "),
        ({"x.txt": b"caf\xe9", "y.txt": b"caf\xe9"}, r"caption \('x\.png': its caption 'x\.txt' is not UTF-8; save it"),
        ({"metadata.csv": b"file_name,text\nz.png,a duck\n"}, "none of 2 images has a caption: "),
        ({"metadata.csv": b"file_name,txet\nx.png,a duck\n"}, "has the columns file_name, txet, but needs"),
    ],
)
def test_folder_without_captions_is_refused_before_it_is_read(tmp_path: Path, files: dict[str, bytes], message: str):
    for name in ("x.png", "y.png"):
        write(tmp_path / name)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    config = dataclasses.replace(CAPTIONED, path=str(tmp_path))
    with pytest.raises(InvalidCaptions, match=message):
        survey_source(config)
    (tmp_path / "y.txt").write_text("a duck")
    (tmp_path / "metadata.csv").unlink(missing_ok=True)
    assert survey_source(config)


def test_caption_without_its_image_is_named(tmp_path: Path):
    write(tmp_path / "x.png")
    (tmp_path / "y.txt").write_text("a duck")
    _, note = read_image_tree(tmp_path, (), CAPTIONED)
    assert isinstance(note, Unreadable) and note.reason == "no image has the name of this caption"


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a" * (MAX_CAPTION + 1), b"a" * (2**20 + 1)])
def test_image_with_a_bad_caption_is_unreadable_and_named(tmp_path: Path, content: bytes):
    write(tmp_path / "x.png")
    (tmp_path / "x.txt").write_bytes(content)
    (sample,) = read_image_tree(tmp_path, (), CAPTIONED)
    assert isinstance(sample, Unreadable) and sample.name == "x.png" and sample.is_image
    (sample, note) = read_image_tree(tmp_path, ())
    assert isinstance(sample, Sample) and isinstance(note, Unreadable) and not note.is_image


def test_name_that_leaves_no_room_for_a_caption_has_none(tmp_path: Path):
    write(tmp_path / f"{'x' * 251}.png")
    (sample,) = read_image_tree(tmp_path, (), CAPTIONED)
    assert isinstance(sample, Sample) and sample.caption == ""


def test_each_line_beside_an_image_is_a_caption(tmp_path: Path):
    write(tmp_path / "x.png")
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfa  drake\r\n\r\n un canard\x0b\xc2\x93mot\n")
    assert find_captions(tmp_path / "x.png", tmp_path, CAPTIONED) == ("a drake", (("un canard mot", 1.0),))


@given(st.text(max_size=80))
def test_normalized_caption_is_stable_and_printable(text: str):
    caption = normalize_caption(text)
    assert normalize_caption(caption) == caption and is_printable(caption)
