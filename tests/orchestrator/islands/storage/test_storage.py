"""Trees and JSON files: round trips, transfer of changed content only, and atomic updates for readers."""

import shutil
import threading
import time
from functools import partial
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddm_core.artifacts import ArtifactError, atomic_folder, list_files, read_json, write_json
from orchestrator.islands.storage.object_store import map_parallel
from orchestrator.islands.storage.storage import CorruptTransfer, Storage, StorageError, TransferStats

NO_TRANSFER = TransferStats(files=0, bytes=0)

FILE_NAMES = st.text(
    st.characters(exclude_categories=("Cc", "Cs"), exclude_characters="/\\"), min_size=1, max_size=12
).filter(lambda name: name not in (".", "..") and not name.startswith("."))
CONTENTS = st.one_of(st.just(b""), st.binary(max_size=40), st.binary(min_size=1, max_size=3).map(lambda b: b * 30_000))


def flatten(trees: dict) -> dict[str, bytes]:
    """Return files by path, from nested dictionaries."""
    files = {}
    for name, value in trees.items():
        if isinstance(value, bytes):
            files[name] = value
        else:
            files |= {f"{name}/{path}": content for path, content in flatten(value).items()}
    return files


FOLDERS = st.recursive(
    st.dictionaries(FILE_NAMES, CONTENTS, max_size=4),
    lambda inner: st.dictionaries(FILE_NAMES, st.one_of(CONTENTS, inner), max_size=4),
    max_leaves=8,
).map(flatten)


def read_folder(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in list_files(folder)}


def measure(files):
    return TransferStats(files=len(set(files)), bytes=sum(len(content) for content in set(files)))


def assert_round_trip(storage_kind, tmp, first, second):
    """Upload two folders in turn, the second twice; download each over the previous one and into a new folder."""
    storage = storage_kind.open()
    for number, files in enumerate((first, second, second)):
        folder = tmp / f"source{number}"
        folder.mkdir()
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        present = {1: set(first.values()), 2: set(second.values())}.get(number, set())
        assert storage.put_tree(folder, "run/a.tree") == measure(set(files.values()) - present)
        storage.get_tree("run/a.tree", tmp / "back")
        assert read_folder(tmp / "back") == files
        assert storage_kind.open(storage.url).get_tree("run/a.tree", tmp / f"other{number}").files == len(files)
        assert read_folder(tmp / f"other{number}") == files


@settings(max_examples=25, deadline=None)
@given(first=FOLDERS, second=FOLDERS)
def test_tree_in_local_folder_round_trips(local_storage, tmp_path_factory, first, second):
    assert_round_trip(local_storage, tmp_path_factory.mktemp("trees"), first, second)


@pytest.mark.integration
@settings(max_examples=4, deadline=None)
@given(first=FOLDERS, second=FOLDERS)
def test_tree_in_s3_round_trips(s3_storage, tmp_path_factory, first, second):
    assert_round_trip(s3_storage, tmp_path_factory.mktemp("trees"), first, second)


def test_put_and_get_transfer_only_changed_content(storage_kind, make_folder, tmp_path):
    storage = storage_kind.open()
    reader = storage_kind.open(storage.url)
    folder = make_folder({"a": b"a" * 100, "sub/b": b"b" * 200, "sub/manifest.json": b"{}", "manifest.json": b"{ }"})
    assert not storage.has_tree("t") and storage.read_index("t") is None
    assert storage.put_tree(folder, "t") == TransferStats(files=4, bytes=305)
    assert storage_kind.open(storage.url).put_tree(folder, "t") == NO_TRANSFER
    assert reader.get_tree("t", tmp_path / "back") == TransferStats(files=4, bytes=305)
    assert reader.get_tree("t", tmp_path / "back") == NO_TRANSFER
    (folder / "a").write_bytes(b"A" * 100)
    (folder / "sub/b").rename(folder / "moved")
    assert storage.put_tree(folder, "t") == TransferStats(files=1, bytes=100)
    assert reader.sync_tree("t", tmp_path / "back") == TransferStats(files=2, bytes=300)
    assert set(read_folder(tmp_path / "back")) == {"a", "moved", "sub/b", "sub/manifest.json"}
    assert reader.get_tree("t", tmp_path / "back").files == 4
    assert read_folder(tmp_path / "back") == read_folder(folder)
    assert set(storage.read_index("t")) == {"a", "moved", "manifest.json", "sub/manifest.json"}
    assert storage.read_index("t")["a"].bytes == 100


def test_put_deletes_only_unused_content(storage_kind, make_folder):
    storage = storage_kind.open()
    storage.put_tree(make_folder({"a": b"1", "b": b"2"}), "t")
    storage.put_tree(make_folder({"part": b"3"}), "t/clusters/3")
    storage.put_json("t/note.json", 1)
    storage.put_tree(make_folder({"b": b"2"}), "t")
    keys = [key for key in storage._store.list_keys("t") if key.count("/") == 1]
    assert len(keys) == 3
    assert storage.get_json("t/note.json") == 1 and storage.has_tree("t/clusters/3")


def test_put_with_skip_leaves_out_top_level_names(storage_kind, make_folder, tmp_path):
    storage = storage_kind.open()
    folder = make_folder({"cache/big": b"0" * 1000, "sub/cache/small": b"1", "log": b"2"})
    assert storage.put_tree(folder, "t", skip=("cache", "log")) == TransferStats(files=1, bytes=1)
    storage.get_tree("t", tmp_path / "back")
    assert read_folder(tmp_path / "back") == {"sub/cache/small": b"1"}


def test_put_of_empty_folder_creates_a_tree(storage_kind, make_folder, tmp_path):
    storage = storage_kind.open()
    assert storage.put_tree(make_folder({}), "t") == NO_TRANSFER
    assert storage.has_tree("t") and storage.read_index("t") == {}
    storage.get_tree("t", tmp_path / "back")
    assert read_folder(tmp_path / "back") == {}


def test_absent_tree_raises_in_get_and_is_empty_in_sync(storage_kind, make_folder, tmp_path):
    storage = storage_kind.open()
    earlier = make_folder({"a": b"earlier"})
    assert storage.sync_tree("t", earlier) == NO_TRANSFER
    with pytest.raises(StorageError, match="there is no tree t"):
        storage.get_tree("t", earlier)
    assert read_folder(earlier) == {"a": b"earlier"}
    storage.delete("t")


def test_put_of_absent_folder_raises_and_keeps_the_tree(storage_kind, make_folder, tmp_path):
    storage = storage_kind.open()
    storage.put_tree(make_folder({"a": b"1"}), "t")
    with pytest.raises(StorageError, match="is no folder"):
        storage.put_tree(tmp_path / "gone", "t")
    assert storage.get_tree("t", tmp_path / "back").files == 1


def test_file_that_becomes_a_folder_is_transferred(storage_kind, make_folder, tmp_path):
    storage = storage_kind.open()
    for files in ({"a": b"1"}, {"a/b": b"2"}, {"a": b"3"}):
        storage.put_tree(make_folder(files), "t")
        storage.get_tree("t", tmp_path / "back")
        assert read_folder(tmp_path / "back") == files


def test_json_is_visible_to_others_at_once(storage_kind):
    storage = storage_kind.open()
    reader = storage_kind.open(storage.url)
    assert reader.get_json("a/b.json") is None and not reader.has_tree("a")
    for number in range(5):
        storage.put_json("a/b.json", {"beats": number, "é": [None, 1.5]})
        assert reader.get_json("a/b.json") == {"beats": number, "é": [None, 1.5]}
    storage.delete("a/b.json")
    assert reader.get_json("a/b.json") is None


def test_delete_removes_everything_below_a_name_only(storage_kind, make_folder):
    storage = storage_kind.open()
    for name in ("w/a", "w/a/part", "w/ab"):
        storage.put_tree(make_folder({"x": name.encode(), "y": b"y"}), name)
    storage.put_json("w/a.json", 1)
    storage.delete("w/a")
    assert [storage.has_tree(name) for name in ("w/a", "w/a/part", "w/ab")] == [False, False, True]
    assert storage._store.list_keys("w/a") == [] and storage.get_json("w/a.json") == 1
    storage.delete("w")
    assert storage._store.list_keys("w") == []


def test_put_after_foreign_delete_uploads_again(storage_kind, make_folder):
    storage, folder = storage_kind.open(), make_folder({"a": b"1"})
    assert [storage.put_tree(folder, "t").files for _ in range(2)] == [1, 0]
    storage_kind.open(storage.url).delete("t")
    assert storage.put_tree(folder, "t").files == 1


def test_map_parallel_after_error_starts_no_further_call():
    started = []

    def call(number):
        started.append(number)
        time.sleep(0.05)
        raise OSError(f"{number} failed")

    with pytest.raises(OSError, match="0 failed"):
        map_parallel(call, range(100))
    assert len(started) < 100


def run_together(functions):
    """Run all functions in threads that start together; return their results."""
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


@pytest.mark.integration
def test_concurrent_create_json_has_one_winner(storage_kind):
    url = storage_kind.new_url()
    storages = [storage_kind.open(url) for _ in range(4 if storage_kind.kind == "local" else 2)]
    for number in range(200):
        name = f"claims/{number}.json"
        created = run_together([partial(storage.create_json, name, who) for who, storage in enumerate(storages)])
        assert created.count(True) == 1 and created.count(False) == len(storages) - 1
        assert storages[0].get_json(name) == created.index(True)


def test_storage_in_many_threads_is_consistent(storage_kind, make_folder, tmp_path):
    storage = storage_kind.open()
    folders = [make_folder({f"{number}": bytes([number]) * 50_000, "same": b"same"}) for number in range(4)]
    run_together([lambda n=n: storage.put_tree(folders[n], f"t{n}") for n in range(4)])
    run_together([lambda n=n: storage.put_tree(folders[0], "all") for n in range(4)])
    run_together([lambda n=n: storage.get_tree(f"t{n}", tmp_path / f"back{n}") for n in range(4)])
    assert [read_folder(tmp_path / f"back{n}") for n in range(4)] == [read_folder(folder) for folder in folders]
    assert storage.get_tree("all", tmp_path / "all").files == 2


def save_checkpoint(folder, step):
    """Write a checkpoint as `experts/training/checkpoint.py` does: complete the new one, then delete the old one."""
    target = folder / f"step-{step:06d}"
    with atomic_folder(target) as temporary:
        (temporary / "tensors").write_bytes(b"%06d" % step * 50_000)
        write_json(temporary / "state.json", {"step": step})
    for path in folder.iterdir():
        if path != target:
            shutil.rmtree(path)


def read_step(folder):
    """Return the latest step in a folder, and assert that it is complete."""
    latest = max(folder.glob("step-*"))
    step = int(latest.name[5:])
    assert read_json(latest / "state.json") == {"step": step}
    assert (latest / "tensors").read_bytes() == b"%06d" % step * 50_000
    return step


@pytest.mark.integration
def test_mirror_of_folder_in_use_is_always_complete(storage_kind, tmp_path):
    folder, steps, read_steps, deadline = tmp_path / "state", count(1), [], time.monotonic() + 2
    folder.mkdir()
    save_checkpoint(folder, 0)
    storage = storage_kind.open()
    storage.put_tree(folder, "state")
    reader = storage_kind.open(storage.url)

    def read():
        reader.get_tree("state", tmp_path / "read")
        read_steps.append(read_step(tmp_path / "read"))

    def repeat(action):
        try:
            while time.monotonic() < deadline:
                action()
        except (AssertionError, OSError, ArtifactError, StorageError, ValueError) as error:
            return error

    actions = [lambda: save_checkpoint(folder, next(steps)), lambda: storage.put_tree(folder, "state"), read]
    assert run_together([partial(repeat, action) for action in actions]) == [None, None, None]
    assert len(set(read_steps)) >= 3 and read_steps == sorted(read_steps)


def test_growing_log_is_uploaded_as_far_as_it_was_read(storage_kind, make_folder, tmp_path):
    storage, folder = storage_kind.open(), make_folder({"log": b"line of a log\n"})
    is_done = threading.Event()

    def grow():
        with (folder / "log").open("ab", buffering=0) as file:
            while not is_done.is_set():
                file.write(b"line of a log\n")
                time.sleep(0.0005)

    def sync():
        for _ in range(10):
            storage.put_tree(folder, "t")
            storage.sync_tree("t", tmp_path / "copy")
        is_done.set()

    run_together([grow, sync])
    copy = (tmp_path / "copy/log").read_bytes()
    assert copy and (folder / "log").read_bytes().startswith(copy)


@pytest.mark.integration
def test_large_file_round_trips(storage_kind, make_folder, tmp_path):
    content = bytes(range(256)) * (110 << 12)
    storage, folder = storage_kind.open(), make_folder({"large": content})
    assert storage.put_tree(folder, "t") == TransferStats(files=1, bytes=len(content))
    assert storage_kind.open(storage.url).put_tree(folder, "t") == NO_TRANSFER
    storage.get_tree("t", tmp_path / "back")
    assert (tmp_path / "back/large").read_bytes() == content


def test_get_json_of_invalid_json_raises(storage_kind):
    storage = storage_kind.open()
    for data in (b"", b"{", b"\xff", b"[" * 100_000):
        storage._store.write("a.json", data)
        with pytest.raises(CorruptTransfer, match="a.json"):
            storage.get_json("a.json")


def test_create_json_in_memory_raises(make_folder, tmp_path):
    storage = Storage("memory://test/storage")
    storage.put_tree(make_folder({"a/b": b"1"}), "t")
    assert Storage("memory://test/storage").get_tree("t", tmp_path / "back") == TransferStats(files=1, bytes=1)
    with pytest.raises(StorageError, match="no conditional write"):
        storage.create_json("a.json", 1)
    storage.delete("t")
    assert not storage.has_tree("t")
