"""Names, paths and indexes of a hostile storage are refused."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.islands.storage.index import INDEX, Entry, parse_index, render_index, validate_name, validate_path
from orchestrator.islands.storage.open import split_url
from orchestrator.islands.storage.storage import CorruptTransfer, Storage, StorageError

ENTRY = Entry("0" * 64, 3)
PATHS = st.lists(st.text("ab é", min_size=1, max_size=3), min_size=1, max_size=3).map("/".join)


@given(st.dictionaries(PATHS, st.builds(Entry, st.binary(min_size=32, max_size=32).map(bytes.hex), st.integers(0))))
def test_index_round_trips_unless_a_file_is_also_a_folder(index):
    if any(longer.startswith(f"{path}/") for path in index for longer in index):
        with pytest.raises(StorageError, match="both a file and a folder"):
            parse_index(render_index(index), "the index")
    else:
        assert parse_index(render_index(index), "the index") == index


@pytest.mark.parametrize(
    "path",
    [
        "../a",
        "a/../../b",
        "/etc/passwd",
        "a//b",
        "",
        ".",
        "a/.",
        "a\\..\\b",
        "a\nb",
        "a\x00b",
        "a\x1b[2Jb",
        "\x85",
        "\ud800",
    ],
)
def test_hostile_path_is_refused(path, tmp_path):
    with pytest.raises(StorageError):
        validate_path(path)
    content = hashlib.sha256(b"evil").hexdigest()
    (tmp_path / "store/t").mkdir(parents=True)
    (tmp_path / "store/t" / content).write_bytes(b"evil")
    (tmp_path / "store/t" / INDEX).write_bytes(render_index({path: Entry(content, 4)}))
    storage = Storage(str(tmp_path / "store"))
    before = sorted(tmp_path.rglob("*"))
    for method in (storage.get_tree, storage.sync_tree):
        with pytest.raises(StorageError, match="not "):
            method("t", tmp_path / "deep/er/target")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("value", ["x" * 64, "0" * 63, "../" + "0" * 61, 7, None, "0" * 64 + "\n"])
def test_invalid_checksum_is_refused(value):
    with pytest.raises(CorruptTransfer):
        parse_index(render_index({"a": Entry(value, 1)}), "the index")


@pytest.mark.parametrize("value", [-1, "1", 1.0, True, None])
def test_invalid_size_is_refused(value):
    with pytest.raises(CorruptTransfer):
        parse_index(render_index({"a": Entry("0" * 64, value)}), "the index")


@pytest.mark.parametrize("data", [b"", b"null", b"[]", b'{"files":[]}', b'{"files":{"a":1}}', b"[" * 100_000, b"\xff"])
def test_data_without_index_is_refused(data):
    with pytest.raises(CorruptTransfer, match="the index"):
        parse_index(data, "the index")


def test_index_with_changed_byte_or_cut_is_refused():
    data = render_index({"a": ENTRY, "sub/é": Entry("12" * 32, 0)})
    for position, byte in enumerate(data):
        for other in set(range(256)) - {byte}:
            with pytest.raises(CorruptTransfer):
                parse_index(data[:position] + bytes([other]) + data[position + 1 :], "the index")
        with pytest.raises(CorruptTransfer):
            parse_index(data[:position], "the index")


def test_index_in_another_json_form_is_refused():
    data = render_index({"a": ENTRY})
    for variant in (json.dumps(json.loads(data)).encode(), data + b" ", data.replace(b'"a"', b'"\\u0061"')):
        with pytest.raises(CorruptTransfer):
            parse_index(variant, "the index")


@pytest.mark.parametrize(
    "name", ["", "/a", "a/", "a//b", "..", "a/../b", "a/./b", "a b", "a?versionId=1", "a*", "a\n", INDEX]
)
def test_invalid_name_is_refused(name, tmp_path):
    with pytest.raises(StorageError, match="letters, digits"):
        validate_name(name)
    storage = Storage(str(tmp_path))
    for method in (storage.get_json, storage.delete, storage.has_tree, lambda name: storage.put_tree(tmp_path, name)):
        with pytest.raises(StorageError, match="letters, digits"):
            method(name)


def test_valid_names_are_accepted():
    for name in ("artifacts/expert_3-0123456789ab/clusters/3", "work/x/attempt_1.job.json", "größe=1,a+b@c"):
        assert validate_name(name) == name


@pytest.mark.parametrize(
    "url",
    [
        "",
        "relative/folder",
        "http://host/x",
        "pipe:cat",
        "s3://",
        "s3://key:secret@bucket/x",
        "s3://bucket/../x",
        "s3://bucket/x?versionId=1",
        "s3://bucket/x::s3://y",
        "/x::pipe:cat",
        "file://host/x",
        "file://relative",
        "simplecache::s3://b",
    ],
)
def test_invalid_url_is_refused(url):
    with pytest.raises(StorageError, match="not "):
        Storage(url)


def test_valid_urls_are_split():
    assert split_url("/a folder/x#1/") == ("file", "/a folder/x#1")
    assert split_url("file:///a/b") == ("file", "/a/b")
    assert split_url("s3://bucket/a/") == ("s3", "bucket/a")
    assert split_url("gcs://bucket") == split_url("gs://bucket") == ("gs", "bucket")


@pytest.mark.parametrize("url", ["s3://bucket/x", "/x", "memory://x"])
def test_unknown_option_such_as_a_secret_is_refused(url):
    with pytest.raises(StorageError, match="option"):
        Storage(url, {"secret": "hush"})
