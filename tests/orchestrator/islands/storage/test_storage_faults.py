"""Storages that are changed, full, read-only, refused, away, and writers that are killed."""

import contextlib
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from itertools import count

import pytest

from orchestrator.islands.storage.index import INDEX, Entry
from orchestrator.islands.storage.storage import CorruptTransfer, Storage, StorageError, StorageUnreachable
from tests.orchestrator.islands.storage.test_storage import at_once, content_of

FILES = {"a.json": b'{"step": 1}', "sub/weights": bytes(range(60)), "empty": b""}


def damages(data, step):
    """A byte changed, or the end cut off, at every `step`-th place; and something added."""
    for place in range(0, len(data), step):
        yield data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :]
        yield data[:place]
    yield data + b"\n"


@pytest.mark.slow
def test_every_damage_is_noticed_and_mended(place, folder_of, tmp_path):
    storage, source = place.storage(), folder_of(FILES)
    storage.put_tree(source, "t")
    target, raw, noticed = folder_of({"a": b"earlier"}), storage._objects, 0
    keys = raw.below("t")
    assert len(keys) == 4
    for key in keys:
        data = raw.read(key)
        for changed in damages(data, 1 if place.kind == "local" else 37):
            raw.write(key, changed)
            with pytest.raises(CorruptTransfer, match="t"):
                storage.get_tree("t", target)
            noticed += 1
        raw.write(key, data[::-1] or b"\n")
        with pytest.raises(CorruptTransfer):
            storage.sync_tree("t", tmp_path / key)
        assert all(FILES[name] == content for name, content in content_of(tmp_path / key).items())
        assert storage.put_tree(source, "t").files == (0 if key.endswith(INDEX) else 1)
        assert raw.read(key) == data
    assert content_of(target) == {"a": b"earlier"}
    storage.get_tree("t", target)
    assert content_of(target) == FILES
    assert noticed > (600 if place.kind == "local" else 20)


def test_what_is_missing_is_named_and_mended(place, folder_of, tmp_path):
    storage, source = place.storage(), folder_of(FILES)
    storage.put_tree(source, "t")
    for key in storage._objects.below("t"):
        storage._objects.remove(key)
        if key.endswith(INDEX):
            assert not storage.has_tree("t")
        else:
            with pytest.raises(CorruptTransfer, match="missing"):
                storage.get_tree("t", tmp_path / "back")
        storage.put_tree(source, "t")
    storage.get_tree("t", tmp_path / "back")
    assert content_of(tmp_path / "back") == FILES


def test_swapped_contents_are_noticed(place, folder_of, tmp_path):
    storage = place.storage()
    storage.put_tree(folder_of({"a": b"1", "b": b"2"}), "t")
    index, raw = storage.tree("t"), storage._objects
    raw.write(f"t/{index['a'].sha256}", b"2")
    raw.write(f"t/{index['b'].sha256}", b"1")
    with pytest.raises(CorruptTransfer, match=r"2 file\(s\).*a \(changed\), b \(changed\)"):
        storage.get_tree("t", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("size", [10, 40 << 20])
def test_content_that_changes_on_its_way_is_not_there_afterwards(place, tmp_path, size):
    objects, path, ended = place.storage()._objects, tmp_path / "file", threading.Event()
    path.write_bytes(b"0" * size)

    def send():
        with path.open("rb") as file:
            try:
                return objects.send("key", file, Entry("0" * 64, size))
            finally:
                ended.set()

    def touch():
        for moment in count():
            os.utime(path, (moment, moment))
            if ended.is_set():
                return

    assert at_once([send, touch])[0] is False
    assert objects.read("key") is None


def test_content_that_was_cut_short_is_sent_again(place, folder_of):
    storage, source = place.storage(), folder_of({"a": b"12345", "b": b"6789"})
    storage.put_tree(source, "t")
    key = f"t/{storage.tree('t')['a'].sha256}"
    storage._objects.write(key, b"123")
    assert storage.put_tree(source, "t").files == 1
    assert storage._objects.read(key) == b"12345"


KILLED = """
    import os, random, signal, sys, time
    from pathlib import Path
    from orchestrator.islands.storage.storage import Storage

    url, base, rounds = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    files = ("a", "b/c", "b/d", "e")
    for version in range(3):
        for name in files:
            path = base / f"source{version}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes([version]) * random.Random(name).randrange(100_000, 300_000))
    Storage(url).put_tree(base / "source0", "t")
    seen = set()
    for round in range(rounds):
        child = os.fork()
        if not child:
            storage = Storage(url)
            while True:
                storage.put_tree(base / f"source{random.randrange(3)}", "t")
        time.sleep(random.Random(round).random() * 0.06)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        Storage(url).get_tree("t", base / "back")
        found = {name: (base / "back" / name).read_bytes() for name in files}
        version = found["a"][0]
        assert found == {name: (base / f"source{version}" / name).read_bytes() for name in files}, round
        seen.add(version)
    print(sorted(seen), end="")
"""


@pytest.mark.slow
def test_a_writer_that_is_killed_leaves_the_tree_before_or_after(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "store"), str(tmp_path), "60"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "[0, 1, 2]"


def test_what_killed_writers_have_left_is_cleared_away(tmp_path, folder_of):
    storage = Storage(str(tmp_path / "store"))
    storage.put_tree(folder_of({"a": b"1"}), "t")
    old, young = tmp_path / "store/t/.123.part", tmp_path / "store/t/.456.part"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    storage.put_tree(folder_of({"a": b"2"}), "t")
    assert not old.exists() and young.exists()


def test_a_full_disk_is_named_and_loses_nothing(small_disk, folder_of, tmp_path):
    storage = Storage(str(small_disk / "store"))
    small, large = folder_of({"a": b"1" * 1000}), folder_of({f"{n}": os.urandom(5 << 20) for n in range(4)})
    storage.put_tree(small, "t")
    storage.put_json("word.json", {"a": 1})
    with pytest.raises(StorageError, match="the disk is full.*free space"):
        storage.put_tree(large, "t")
    assert not list(small_disk.rglob("*.part"))
    assert storage.get_tree("t", tmp_path / "back").files == 1
    (small_disk / "filler").write_bytes(b"")
    with pytest.raises(OSError, match="No space"), (small_disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(b"0" * 4096)
    with pytest.raises(StorageError, match="the disk is full"):
        storage.put_json("word.json", {"a": 2, "long": "x" * 10_000})
    assert storage.get_json("word.json") == {"a": 1}
    (small_disk / "filler").unlink()
    storage.delete("t")
    assert storage.put_tree(folder_of({"a": b"1" * (9 << 20)}), "t").files == 1


def test_a_full_disk_on_this_side_leaves_the_earlier_folder(place, small_disk, folder_of):
    storage = place.storage()
    storage.put_tree(folder_of({"a": b"1"}), "t")
    storage.get_tree("t", small_disk / "here")
    storage.put_tree(folder_of({f"{n}": os.urandom(5 << 20) for n in range(4)}), "t")
    with pytest.raises(StorageError, match="the disk is full"):
        storage.get_tree("t", small_disk / "here")
    assert content_of(small_disk / "here") == {"a": b"1"}
    assert [path.name for path in small_disk.iterdir()] == ["here"]


def test_a_read_only_storage_is_named_and_can_be_read(small_disk, folder_of, tmp_path):
    storage, source = Storage(str(small_disk / "store")), folder_of({"a": b"1"})
    storage.put_tree(source, "t")
    storage.put_json("a.json", 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    (source / "a").write_bytes(b"2")
    for change in (
        lambda: storage.put_tree(source, "t"),
        lambda: storage.put_tree(source, "new"),
        lambda: storage.put_json("a.json", 2),
        lambda: storage.create_json("b.json", 2),
        lambda: storage.delete("t"),
    ):
        with pytest.raises(StorageError, match="read-only.*name another storage"):
            change()
    assert storage.get_tree("t", tmp_path / "back").files == 1 and storage.get_json("a.json") == 1
    with pytest.raises(StorageError, match="read-only"):
        storage.get_tree("t", small_disk / "back")


def test_a_storage_that_is_a_file_is_refused(tmp_path, folder_of):
    (tmp_path / "file").write_text("")
    storage = Storage(str(tmp_path / "file"))
    assert storage.get_json("a") is None and not storage.has_tree("t")
    with pytest.raises(StorageError, match="check that the storage is what its URL says"):
        storage.put_tree(folder_of({"a": b"1"}), "t")


def opened(server, url="s3://bucket/faults"):
    return Storage(url, {"endpoint_url": server.endpoint})


def every_use(storage, folder):
    return [
        lambda: storage.put_tree(folder, "t"),
        lambda: storage.get_tree("t", folder.with_name("back")),
        lambda: storage.sync_tree("t", folder.with_name("back")),
        lambda: storage.has_tree("t"),
        lambda: storage.put_json("a.json", 1),
        lambda: storage.get_json("a.json"),
        lambda: storage.create_json("b.json", 1),
        lambda: storage.delete("t"),
    ]


def test_a_bucket_that_is_missing_is_named(s3_server, folder_of):
    for use in every_use(opened(s3_server, "s3://nobodys/x"), folder_of({"a": b"1"})):
        with pytest.raises(StorageError, match="no such bucket") as caught:
            use()
        assert not isinstance(caught.value, StorageUnreachable)


def test_credentials_that_are_refused_are_named(s3_server, folder_of):
    folder = folder_of({"a": b"1"})
    opened(s3_server).put_tree(folder, "t")
    s3_server.call("POST", "/moto-api/reset-auth", b"0")
    try:
        for use in every_use(opened(s3_server), folder):
            with pytest.raises(StorageError, match="access is refused.*credentials") as caught:
                use()
            assert not isinstance(caught.value, StorageUnreachable)
    finally:
        s3_server.call("POST", "/moto-api/reset-auth", b"inf")
    assert opened(s3_server).has_tree("t")


def test_credentials_that_are_missing_are_named(s3_server, s3_environment, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.delenv(name)
        patch.setenv("HOME", str(tmp_path))
        with pytest.raises(StorageError, match="Unable to locate credentials.*environment"):
            opened(s3_server).get_json("a.json")


@pytest.mark.slow
def test_a_server_that_is_away_is_unreachable_and_comes_back(s3_server, folder_of):
    folder = folder_of({"a": b"1"})
    storage = opened(s3_server)
    storage.put_tree(folder, "t")
    s3_server.stop()
    try:
        started = time.monotonic()
        for use in every_use(storage, folder):
            with pytest.raises(StorageUnreachable, match="no answer"):
                use()
        assert time.monotonic() - started < 15
    finally:
        s3_server.start()
    assert not storage.has_tree("t")
    assert storage.put_tree(folder, "t").files == 1
    storage.get_tree("t", folder.with_name("back"))


@contextlib.contextmanager
def swallowing():
    """A port of which no packet comes back: its queue of connections is full."""
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for client in (first, second):
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        yield full.getsockname()[1]


@pytest.mark.slow
def test_a_server_that_hangs_or_swallows_packets_is_unreachable_within_seconds(s3_server, folder_of, tmp_path):
    storage = opened(s3_server)
    storage.put_tree(folder_of({"a": b"hanging"}), "t")
    many = folder_of({f"{n}": b"%d" % n for n in range(30)})

    def fails_within(seconds, use):
        started = time.monotonic()
        with pytest.raises(StorageUnreachable, match="no answer"):
            use()
        return time.monotonic() - started < seconds

    s3_server.freeze()
    try:
        with swallowing() as port:
            silent = Storage("s3://bucket/x", {"endpoint_url": f"http://127.0.0.1:{port}"})
            hanging = lambda: fails_within(20, lambda: storage.put_tree(many, "t"))  # noqa: E731
            assert at_once([hanging, lambda: fails_within(12, lambda: silent.get_json("a.json"))]) == [True, True]
    finally:
        s3_server.thaw()
    storage.get_tree("t", tmp_path / "back")
    assert content_of(tmp_path / "back") == {"a": b"hanging"}
    assert storage.put_tree(many, "t").files == 30


def test_somebody_else_who_answers_404_is_not_an_empty_storage(s3_environment, tmp_path):
    command = [sys.executable, "-u", "-m", "http.server", "--bind", "127.0.0.1", "0", "--directory", str(tmp_path)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        port = server.stdout.readline().split(" port ")[1].split()[0]
        storage = Storage("s3://bucket/x", {"endpoint_url": f"http://127.0.0.1:{port}"})
        for use in (storage.get_json, storage.has_tree, lambda name: storage.sync_tree(name, tmp_path / name)):
            with pytest.raises(StorageUnreachable, match="not as an object storage does"):
                use("t")
    finally:
        server.kill()
        server.communicate()


def test_a_driver_that_is_missing_is_named():
    code = "import sys; sys.modules['s3fs'] = None\nfrom orchestrator.islands.storage.storage import Storage; Storage('s3://bucket/x')"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "StorageError: s3: storage needs a driver" in ran.stderr and "decentralized-diffusion[cloud]" in ran.stderr
