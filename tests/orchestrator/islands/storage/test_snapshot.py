"""Snapshots of a folder in which another process writes."""

import os
import time

import pytest

from orchestrator.islands.storage.object_store import hash_stream
from orchestrator.islands.storage.snapshot import OPEN_FILES, SETTLE_S, Checksums, snapshot
from orchestrator.islands.storage.storage import Storage, StorageError


def test_open_file_is_readable_after_it_was_deleted(make_folder):
    folder = make_folder({"a": b"first", "b": b"second", "c": b"second"})
    with snapshot(folder, (), Checksums(), {}) as taken:
        (folder / "a").unlink()
        (folder / "b").write_bytes(b"another")
        (folder / "b").rename(folder / "a")
        assert set(taken.index) == {"a", "b", "c"} and len(taken.open_files) == 2
        assert hash_stream(taken.open_files[taken.index["a"]], 5) == taken.index["a"]


def test_unfinished_files_are_skipped(make_folder):
    folder = make_folder({".progress.json.123": b"1", ".step-1.77/state": b"2", ".hidden": b"3", ".a/b.1": b"4"})
    with snapshot(folder, (), Checksums(), {}) as taken:
        assert set(taken.index) == {".hidden", ".a/b.1"}


def test_checksum_is_computed_again_only_after_a_change(make_folder):
    path = make_folder({"a": b"12"}) / "a"
    checksums, timestamp = Checksums(), time.time() - 10 * SETTLE_S
    os.utime(path, (timestamp, timestamp))
    first = checksums.get(path)
    assert checksums.lookup(path, path.stat()) == first
    path.write_bytes(b"21")
    assert checksums.lookup(path, path.stat()) is None
    assert checksums.get(path) != first


def test_checksum_of_recent_file_is_computed_again(make_folder):
    path = make_folder({"a": b"12"}) / "a"
    checksums, state = Checksums(), path.stat()
    first = checksums.get(path)
    path.write_bytes(b"21")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert checksums.get(path) != first


def test_more_files_than_open_files_are_sent_in_rounds(make_folder, tmp_path):
    folder = make_folder({f"{number}": b"%d" % number for number in range(2 * OPEN_FILES + 10)})
    with snapshot(folder, (), Checksums(), {}) as taken:
        assert len(taken.open_files) == OPEN_FILES and not taken.is_complete
    storage = Storage(str(tmp_path / "store"))
    assert storage.put_tree(folder, "t").files == 2 * OPEN_FILES + 10
    assert len(storage.read_index("t")) == 2 * OPEN_FILES + 10


def test_file_with_hostile_name_is_refused(make_folder, tmp_path):
    storage = Storage(str(tmp_path / "store"))
    for name in ("a\\b", "a\nb"):
        with pytest.raises(StorageError, match="rename the file"):
            storage.put_tree(make_folder({name: b""}), "t")
    assert not storage.has_tree("t")


@pytest.mark.parametrize("target", ["a", "nowhere", ".", "/etc/passwd"])
def test_link_is_refused(make_folder, target):
    folder = make_folder({"a": b"1", "sub/b": b"2"})
    (folder / "sub" / "link").symlink_to(target)
    with pytest.raises(StorageError, match="is a link"), snapshot(folder, (), Checksums(), {}):
        pass


def test_only_regular_files_are_in_the_snapshot(make_folder):
    folder = make_folder({"a": b"1", "sub/b": b"2"})
    os.mkfifo(folder / "pipe")
    with snapshot(folder, (), Checksums(), {}) as taken:
        assert set(taken.index) == {"a", "sub/b"}
