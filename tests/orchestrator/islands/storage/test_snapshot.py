"""What a folder holds while somebody works in it."""

import os
import time

import pytest

from orchestrator.islands.storage.object_store import hash_stream
from orchestrator.islands.storage.snapshot import OPEN_FILES, SETTLED_S, Checksums, snapshot
from orchestrator.islands.storage.storage import Storage, StorageError


def test_a_file_can_be_sent_after_it_is_gone(folder_of):
    folder = folder_of({"a": b"first", "b": b"second", "c": b"second"})
    with snapshot(folder, (), Checksums(), {}) as taken:
        (folder / "a").unlink()
        (folder / "b").write_bytes(b"another")
        (folder / "b").rename(folder / "a")
        assert set(taken.index) == {"a", "b", "c"} and len(taken.opened) == 2
        assert hash_stream(taken.opened[taken.index["a"]], 5) == taken.index["a"]


def test_what_is_being_written_is_left_out(folder_of):
    folder = folder_of({".progress.json.123": b"1", ".step-1.77/state": b"2", ".hidden": b"3", ".a/b.1": b"4"})
    with snapshot(folder, (), Checksums(), {}) as taken:
        assert set(taken.index) == {".hidden", ".a/b.1"}


def test_a_file_is_read_again_only_if_it_has_changed(folder_of):
    path = folder_of({"a": b"12"}) / "a"
    checksums, old = Checksums(), time.time() - 10 * SETTLED_S
    os.utime(path, (old, old))
    first = checksums.of(path)
    assert checksums.known(path, path.stat()) == first
    path.write_bytes(b"21")
    assert checksums.known(path, path.stat()) is None
    assert checksums.of(path) != first


def test_a_file_that_was_just_written_is_read_again_even_if_it_looks_the_same(folder_of):
    path = folder_of({"a": b"12"}) / "a"
    checksums, state = Checksums(), path.stat()
    first = checksums.of(path)
    path.write_bytes(b"21")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert checksums.of(path) != first


def test_more_files_than_may_be_open_are_sent_in_rounds(folder_of, tmp_path):
    folder = folder_of({f"{number}": b"%d" % number for number in range(2 * OPEN_FILES + 10)})
    with snapshot(folder, (), Checksums(), {}) as taken:
        assert len(taken.opened) == OPEN_FILES and not taken.whole
    storage = Storage(str(tmp_path / "store"))
    assert storage.put_tree(folder, "t").files == 2 * OPEN_FILES + 10
    assert len(storage.tree("t")) == 2 * OPEN_FILES + 10


def test_a_file_whose_name_is_hostile_is_not_sent(folder_of, tmp_path):
    storage = Storage(str(tmp_path / "store"))
    for name in ("a\\b", "a\nb"):
        with pytest.raises(StorageError, match="rename the file"):
            storage.put_tree(folder_of({name: b""}), "t")
    assert not storage.has_tree("t")


@pytest.mark.parametrize("target", ["a", "nowhere", ".", "/etc/passwd"])
def test_a_link_is_refused_whatever_it_names(folder_of, target):
    folder = folder_of({"a": b"1", "sub/b": b"2"})
    (folder / "sub" / "link").symlink_to(target)
    with pytest.raises(StorageError, match="is a link"), snapshot(folder, (), Checksums(), {}):
        pass


def test_only_regular_files_are_sent(folder_of):
    folder = folder_of({"a": b"1", "sub/b": b"2"})
    os.mkfifo(folder / "pipe")
    with snapshot(folder, (), Checksums(), {}) as taken:
        assert set(taken.index) == {"a", "sub/b"}
