"""Trees and JSON files: what goes in comes out, only what differs moves, and a reader sees before or after."""

import shutil
import threading
import time
from functools import partial
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddm_core.artifacts import ArtifactError, atomic_folder, files_in, read_json, write_json
from orchestrator.islands.storage.object_store import map_parallel
from orchestrator.islands.storage.storage import CorruptTransfer, Storage, StorageError, TransferStats

NOTHING = TransferStats(files=0, bytes=0)

FILE_NAMES = st.text(
    st.characters(exclude_categories=("Cc", "Cs"), exclude_characters="/\\"), min_size=1, max_size=12
).filter(lambda name: name not in (".", "..") and not name.startswith("."))
CONTENTS = st.one_of(st.just(b""), st.binary(max_size=40), st.binary(min_size=1, max_size=3).map(lambda b: b * 30_000))


def flat(trees: dict) -> dict[str, bytes]:
    """Files by path, from nested dictionaries."""
    files = {}
    for name, value in trees.items():
        if isinstance(value, bytes):
            files[name] = value
        else:
            files |= {f"{name}/{path}": content for path, content in flat(value).items()}
    return files


FOLDERS = st.recursive(
    st.dictionaries(FILE_NAMES, CONTENTS, max_size=4),
    lambda inner: st.dictionaries(FILE_NAMES, st.one_of(CONTENTS, inner), max_size=4),
    max_leaves=8,
).map(flat)


def content_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files_in(folder)}


def size_of(files):
    return TransferStats(files=len(set(files)), bytes=sum(len(content) for content in set(files)))


def comes_back(place, tmp, first, second):
    """Send two folders one after the other, and the second again; fetch each over the one before and anew."""
    storage = place.storage()
    for number, files in enumerate((first, second, second)):
        folder = tmp / f"source{number}"
        folder.mkdir()
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        old = {1: set(first.values()), 2: set(second.values())}.get(number, set())
        assert storage.put_tree(folder, "run/a.tree") == size_of(set(files.values()) - old)
        storage.get_tree("run/a.tree", tmp / "back")
        assert content_of(tmp / "back") == files
        assert place.storage(storage.url).get_tree("run/a.tree", tmp / f"other{number}").files == len(files)
        assert content_of(tmp / f"other{number}") == files


@settings(max_examples=25, deadline=None)
@given(first=FOLDERS, second=FOLDERS)
def test_a_tree_comes_back_as_it_was_from_a_folder(local, tmp_path_factory, first, second):
    comes_back(local, tmp_path_factory.mktemp("trees"), first, second)


@pytest.mark.slow
@settings(max_examples=4, deadline=None)
@given(first=FOLDERS, second=FOLDERS)
def test_a_tree_comes_back_as_it_was_from_s3(s3, tmp_path_factory, first, second):
    comes_back(s3, tmp_path_factory.mktemp("trees"), first, second)


def test_only_what_differs_moves(place, folder_of, tmp_path):
    storage, reader = place.storage(), None
    reader = place.storage(storage.url)
    folder = folder_of({"a": b"a" * 100, "sub/b": b"b" * 200, "sub/manifest.json": b"{}", "manifest.json": b"{ }"})
    assert not storage.has_tree("t") and storage.tree("t") is None
    assert storage.put_tree(folder, "t") == TransferStats(files=4, bytes=305)
    assert place.storage(storage.url).put_tree(folder, "t") == NOTHING
    assert reader.get_tree("t", tmp_path / "back") == TransferStats(files=4, bytes=305)
    assert reader.get_tree("t", tmp_path / "back") == NOTHING
    (folder / "a").write_bytes(b"A" * 100)
    (folder / "sub/b").rename(folder / "moved")
    assert storage.put_tree(folder, "t") == TransferStats(files=1, bytes=100)
    assert reader.sync_tree("t", tmp_path / "back") == TransferStats(files=2, bytes=300)
    assert set(content_of(tmp_path / "back")) == {"a", "moved", "sub/b", "sub/manifest.json"}
    assert reader.get_tree("t", tmp_path / "back").files == 4
    assert content_of(tmp_path / "back") == content_of(folder)
    assert set(storage.tree("t")) == {"a", "moved", "manifest.json", "sub/manifest.json"}
    assert storage.tree("t")["a"].bytes == 100


def test_what_is_no_longer_named_is_deleted_and_nothing_else(place, folder_of):
    storage = place.storage()
    storage.put_tree(folder_of({"a": b"1", "b": b"2"}), "t")
    storage.put_tree(folder_of({"part": b"3"}), "t/clusters/3")
    storage.put_json("t/word.json", 1)
    storage.put_tree(folder_of({"b": b"2"}), "t")
    contents = [key for key in storage._objects.below("t") if key.count("/") == 1]
    assert len(contents) == 3
    assert storage.get_json("t/word.json") == 1 and storage.has_tree("t/clusters/3")


def test_names_at_the_top_can_be_left_out(place, folder_of, tmp_path):
    storage = place.storage()
    folder = folder_of({"cache/big": b"0" * 1000, "keep/cache/small": b"1", "log": b"2"})
    assert storage.put_tree(folder, "t", skip=("cache", "log")) == TransferStats(files=1, bytes=1)
    storage.get_tree("t", tmp_path / "back")
    assert content_of(tmp_path / "back") == {"keep/cache/small": b"1"}


def test_an_empty_folder_is_a_tree(place, folder_of, tmp_path):
    storage = place.storage()
    assert storage.put_tree(folder_of({}), "t") == NOTHING
    assert storage.has_tree("t") and storage.tree("t") == {}
    storage.get_tree("t", tmp_path / "back")
    assert content_of(tmp_path / "back") == {}


def test_an_absent_tree_is_an_error_or_no_files(place, folder_of, tmp_path):
    storage = place.storage()
    earlier = folder_of({"a": b"earlier"})
    assert storage.sync_tree("t", earlier) == NOTHING
    with pytest.raises(StorageError, match="there is no tree t"):
        storage.get_tree("t", earlier)
    assert content_of(earlier) == {"a": b"earlier"}
    storage.delete("t")


def test_an_absent_folder_does_not_empty_a_tree(place, folder_of, tmp_path):
    storage = place.storage()
    storage.put_tree(folder_of({"a": b"1"}), "t")
    with pytest.raises(StorageError, match="is no folder"):
        storage.put_tree(tmp_path / "gone", "t")
    assert storage.get_tree("t", tmp_path / "back").files == 1


def test_a_file_may_become_a_folder(place, folder_of, tmp_path):
    storage = place.storage()
    for files in ({"a": b"1"}, {"a/b": b"2"}, {"a": b"3"}):
        storage.put_tree(folder_of(files), "t")
        storage.get_tree("t", tmp_path / "back")
        assert content_of(tmp_path / "back") == files


def test_json_is_seen_at_once_by_others(place):
    storage = place.storage()
    reader = place.storage(storage.url)
    assert reader.get_json("a/b.json") is None and not reader.has_tree("a")
    for number in range(5):
        storage.put_json("a/b.json", {"beats": number, "é": [None, 1.5]})
        assert reader.get_json("a/b.json") == {"beats": number, "é": [None, 1.5]}
    storage.delete("a/b.json")
    assert reader.get_json("a/b.json") is None


def test_delete_takes_all_that_lies_below_and_no_neighbour(place, folder_of):
    storage = place.storage()
    for name in ("w/a", "w/a/part", "w/ab"):
        storage.put_tree(folder_of({"x": name.encode(), "y": b"y"}), name)
    storage.put_json("w/a.json", 1)
    storage.delete("w/a")
    assert [storage.has_tree(name) for name in ("w/a", "w/a/part", "w/ab")] == [False, False, True]
    assert storage._objects.below("w/a") == [] and storage.get_json("w/a.json") == 1
    storage.delete("w")
    assert storage._objects.below("w") == []


def test_a_tree_that_another_has_deleted_is_sent_again(place, folder_of):
    mine, folder = place.storage(), folder_of({"a": b"1"})
    assert [mine.put_tree(folder, "t").files for _ in range(2)] == [1, 0]
    place.storage(mine.url).delete("t")
    assert mine.put_tree(folder, "t").files == 1


def test_after_the_first_error_no_call_begins():
    begun = []

    def call(number):
        begun.append(number)
        time.sleep(0.01)
        raise OSError(f"{number} failed")

    with pytest.raises(OSError, match="0 failed"):
        map_parallel(call, range(100))
    assert len(begun) < 20


def at_once(functions):
    """Run all of them in threads that start together; their results."""
    start, results = threading.Barrier(len(functions)), [None] * len(functions)

    def run(number, function):
        start.wait()
        results[number] = function()

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.slow
def test_of_those_who_create_a_file_at_once_one_wins(place):
    url = place.url()
    seen = [place.storage(url) for _ in range(4 if place.kind == "local" else 2)]
    for number in range(200):
        tries = [partial(seen[who].create_json, f"claims/{number}.json", who) for who in range(len(seen))]
        won = at_once(tries)
        assert won.count(True) == 1 and won.count(False) == len(seen) - 1
        assert seen[0].get_json(f"claims/{number}.json") == won.index(True)


def test_many_threads_use_one_storage(place, folder_of, tmp_path):
    storage = place.storage()
    folders = [folder_of({f"{number}": bytes([number]) * 50_000, "same": b"same"}) for number in range(4)]
    at_once([lambda n=n: storage.put_tree(folders[n], f"t{n}") for n in range(4)])
    at_once([lambda n=n: storage.put_tree(folders[0], "all") for n in range(4)])
    at_once([lambda n=n: storage.get_tree(f"t{n}", tmp_path / f"back{n}") for n in range(4)])
    assert [content_of(tmp_path / f"back{n}") for n in range(4)] == [content_of(folder) for folder in folders]
    assert storage.get_tree("all", tmp_path / "all").files == 2


def save(folder, step):
    """A checkpoint as `experts/training/checkpoint.py` writes it: the new one is whole before the old one goes."""
    new = folder / f"step-{step:06d}"
    with atomic_folder(new) as temporary:
        (temporary / "tensors").write_bytes(b"%06d" % step * 50_000)
        write_json(temporary / "state.json", {"step": step})
    for path in folder.iterdir():
        if path != new:
            shutil.rmtree(path)


def saved_step(folder):
    """The newest step in a folder, which must be whole."""
    newest = max(folder.glob("step-*"))
    step = int(newest.name[5:])
    assert read_json(newest / "state.json") == {"step": step}
    assert (newest / "tensors").read_bytes() == b"%06d" % step * 50_000
    return step


@pytest.mark.slow
def test_a_folder_that_is_worked_in_is_mirrored_whole(place, tmp_path):
    folder, steps, seen, until = tmp_path / "state", count(1), [], time.monotonic() + 2
    folder.mkdir()
    save(folder, 0)
    storage = place.storage()
    storage.put_tree(folder, "state")
    reader = place.storage(storage.url)

    def read():
        reader.get_tree("state", tmp_path / "read")
        seen.append(saved_step(tmp_path / "read"))

    def again(action):
        try:
            while time.monotonic() < until:
                action()
        except (AssertionError, OSError, ArtifactError, StorageError, ValueError) as error:
            return error

    actions = [lambda: save(folder, next(steps)), lambda: storage.put_tree(folder, "state"), read]
    assert at_once([partial(again, action) for action in actions]) == [None, None, None]
    assert len(set(seen)) >= 3 and seen == sorted(seen)


def test_a_growing_log_is_sent_as_far_as_it_was_read(place, folder_of, tmp_path):
    storage, folder = place.storage(), folder_of({"log": b""})
    ended = threading.Event()

    def grow():
        with (folder / "log").open("ab", buffering=0) as file:
            while not ended.is_set():
                file.write(b"line of a log\n")
                time.sleep(0.0005)

    def follow():
        for _ in range(10):
            storage.put_tree(folder, "t")
            storage.sync_tree("t", tmp_path / "seen")
        ended.set()

    at_once([grow, follow])
    seen = (tmp_path / "seen/log").read_bytes()
    assert seen and (folder / "log").read_bytes().startswith(seen)


@pytest.mark.slow
def test_a_large_file_is_sent_in_parts(place, folder_of, tmp_path):
    content = bytes(range(256)) * (110 << 12)
    storage, folder = place.storage(), folder_of({"large": content})
    assert storage.put_tree(folder, "t") == TransferStats(files=1, bytes=len(content))
    assert place.storage(storage.url).put_tree(folder, "t") == NOTHING
    storage.get_tree("t", tmp_path / "back")
    assert (tmp_path / "back/large").read_bytes() == content


def test_what_is_not_json_is_named(place):
    storage = place.storage()
    for data in (b"", b"{", b"\xff", b"[" * 100_000):
        storage._objects.write("a.json", data)
        with pytest.raises(CorruptTransfer, match="a.json"):
            storage.get_json("a.json")


def test_memory_has_no_conditional_write(folder_of, tmp_path):
    storage = Storage("memory://test/storage")
    storage.put_tree(folder_of({"a/b": b"1"}), "t")
    assert Storage("memory://test/storage").get_tree("t", tmp_path / "back") == TransferStats(files=1, bytes=1)
    with pytest.raises(StorageError, match="no conditional write"):
        storage.create_json("a.json", 1)
    storage.delete("t")
    assert not storage.has_tree("t")
