"""Storages that are corrupt, full, read-only, refused or unreachable, and writers that are killed."""

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
from tests.orchestrator.islands.storage.test_storage import read_folder, run_together

FILES = {"a.json": b'{"step": 1}', "sub/weights": bytes(range(60)), "empty": b""}


def iter_damages(data, step):
    """Yield the data with a byte changed or the end cut off at every `step`-th position, and with a byte added."""
    for position in range(0, len(data), step):
        yield data[:position] + bytes([data[position] ^ (1 << position % 8)]) + data[position + 1 :]
        yield data[:position]
    yield data + b"\n"


@pytest.mark.integration
def test_every_damage_is_detected_and_repaired(storage_kind, make_folder, tmp_path):
    storage, source = storage_kind.open(), make_folder(FILES)
    storage.put_tree(source, "t")
    target, store, detected = make_folder({"a": b"earlier"}), storage._store, 0
    keys = store.list_keys("t")
    assert len(keys) == 4
    for key in keys:
        data = store.read(key)
        for changed in iter_damages(data, 1 if storage_kind.kind == "local" else 37):
            store.write(key, changed)
            with pytest.raises(CorruptTransfer, match="t"):
                storage.get_tree("t", target)
            detected += 1
        store.write(key, data[::-1] or b"\n")
        with pytest.raises(CorruptTransfer):
            storage.sync_tree("t", tmp_path / key)
        assert all(FILES[name] == content for name, content in read_folder(tmp_path / key).items())
        assert storage.put_tree(source, "t").files == (0 if key.endswith(INDEX) else 1)
        assert store.read(key) == data
    assert read_folder(target) == {"a": b"earlier"}
    storage.get_tree("t", target)
    assert read_folder(target) == FILES
    assert detected > (600 if storage_kind.kind == "local" else 20)


def test_missing_content_is_reported_and_repaired(storage_kind, make_folder, tmp_path):
    storage, source = storage_kind.open(), make_folder(FILES)
    storage.put_tree(source, "t")
    for key in storage._store.list_keys("t"):
        storage._store.delete(key)
        if key.endswith(INDEX):
            assert not storage.has_tree("t")
        else:
            with pytest.raises(CorruptTransfer, match="missing"):
                storage.get_tree("t", tmp_path / "back")
        storage.put_tree(source, "t")
    storage.get_tree("t", tmp_path / "back")
    assert read_folder(tmp_path / "back") == FILES


def test_swapped_contents_are_detected(storage_kind, make_folder, tmp_path):
    storage = storage_kind.open()
    storage.put_tree(make_folder({"a": b"1", "b": b"2"}), "t")
    index, store = storage.read_index("t"), storage._store
    store.write(f"t/{index['a'].sha256}", b"2")
    store.write(f"t/{index['b'].sha256}", b"1")
    with pytest.raises(CorruptTransfer, match=r"2 file\(s\).*a \(changed\), b \(changed\)"):
        storage.get_tree("t", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("size", [10, 40 << 20])
def test_content_that_changes_during_upload_is_not_stored(storage_kind, tmp_path, size):
    store, path, is_done = storage_kind.open()._store, tmp_path / "file", threading.Event()
    path.write_bytes(b"0" * size)

    def upload():
        with path.open("rb") as file:
            try:
                return store.upload("key", file, Entry("0" * 64, size))
            finally:
                is_done.set()

    def touch():
        for timestamp in count():
            os.utime(path, (timestamp, timestamp))
            if is_done.is_set():
                return

    assert run_together([upload, touch])[0] is False
    assert store.read("key") is None


def test_truncated_content_is_uploaded_again(storage_kind, make_folder):
    storage, source = storage_kind.open(), make_folder({"a": b"12345", "b": b"6789"})
    storage.put_tree(source, "t")
    key = f"t/{storage.read_index('t')['a'].sha256}"
    storage._store.write(key, b"123")
    assert storage.put_tree(source, "t").files == 1
    assert storage._store.read(key) == b"12345"


KILL_WRITERS = """
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
    versions = set()
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
        content = {name: (base / "back" / name).read_bytes() for name in files}
        version = content["a"][0]
        assert content == {name: (base / f"source{version}" / name).read_bytes() for name in files}, round
        versions.add(version)
    print(sorted(versions), end="")
"""


@pytest.mark.integration
def test_killed_writer_leaves_a_complete_tree(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(KILL_WRITERS), str(tmp_path / "store"), str(tmp_path), "60"]
    completed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout == "[0, 1, 2]"


def test_abandoned_temporary_file_is_deleted(tmp_path, make_folder):
    storage = Storage(str(tmp_path / "store"))
    storage.put_tree(make_folder({"a": b"1"}), "t")
    abandoned, recent = tmp_path / "store/t/.123.part", tmp_path / "store/t/.456.part"
    for path in (abandoned, recent):
        path.write_bytes(b"half")
    os.utime(abandoned, (0, 0))
    storage.put_tree(make_folder({"a": b"2"}), "t")
    assert not abandoned.exists() and recent.exists()


def test_full_disk_is_reported_and_loses_nothing(small_disk, make_folder, tmp_path):
    storage = Storage(str(small_disk / "store"))
    small, large = make_folder({"a": b"1" * 1000}), make_folder({f"{n}": os.urandom(5 << 20) for n in range(4)})
    storage.put_tree(small, "t")
    storage.put_json("note.json", {"a": 1})
    with pytest.raises(StorageError, match="the disk is full.*free space"):
        storage.put_tree(large, "t")
    assert not list(small_disk.rglob("*.part"))
    assert storage.get_tree("t", tmp_path / "back").files == 1
    (small_disk / "filler").write_bytes(b"")
    with pytest.raises(OSError, match="No space"), (small_disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(b"0" * 4096)
    with pytest.raises(StorageError, match="the disk is full"):
        storage.put_json("note.json", {"a": 2, "long": "x" * 10_000})
    assert storage.get_json("note.json") == {"a": 1}
    (small_disk / "filler").unlink()
    storage.delete("t")
    assert storage.put_tree(make_folder({"a": b"1" * (9 << 20)}), "t").files == 1


def test_full_local_disk_keeps_the_previous_folder(storage_kind, small_disk, make_folder):
    storage = storage_kind.open()
    storage.put_tree(make_folder({"a": b"1"}), "t")
    storage.get_tree("t", small_disk / "target")
    storage.put_tree(make_folder({f"{n}": os.urandom(5 << 20) for n in range(4)}), "t")
    with pytest.raises(StorageError, match="the disk is full"):
        storage.get_tree("t", small_disk / "target")
    assert read_folder(small_disk / "target") == {"a": b"1"}
    assert [path.name for path in small_disk.iterdir()] == ["target"]


def test_read_only_storage_is_reported_and_readable(small_disk, make_folder, tmp_path):
    storage, source = Storage(str(small_disk / "store")), make_folder({"a": b"1"})
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


def test_storage_that_is_a_file_is_refused(tmp_path, make_folder):
    (tmp_path / "file").write_text("")
    storage = Storage(str(tmp_path / "file"))
    assert storage.get_json("a") is None and not storage.has_tree("t")
    with pytest.raises(StorageError, match="check that the storage is of the kind that its URL names"):
        storage.put_tree(make_folder({"a": b"1"}), "t")


def open_s3(server, url="s3://bucket/faults"):
    return Storage(url, {"endpoint_url": server.endpoint})


def list_uses(storage, folder):
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


def test_missing_bucket_is_reported(s3_server, make_folder):
    for use in list_uses(open_s3(s3_server, "s3://absent/x"), make_folder({"a": b"1"})):
        with pytest.raises(StorageError, match="no such bucket") as caught:
            use()
        assert not isinstance(caught.value, StorageUnreachable)


def test_refused_credentials_are_reported(s3_server, make_folder):
    folder = make_folder({"a": b"1"})
    open_s3(s3_server).put_tree(folder, "t")
    s3_server.call("POST", "/moto-api/reset-auth", b"0")
    try:
        for use in list_uses(open_s3(s3_server), folder):
            with pytest.raises(StorageError, match="access is refused.*credentials") as caught:
                use()
            assert not isinstance(caught.value, StorageUnreachable)
    finally:
        s3_server.call("POST", "/moto-api/reset-auth", b"inf")
    assert open_s3(s3_server).has_tree("t")


def test_missing_credentials_are_reported(s3_server, s3_environment, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.delenv(name)
        patch.setenv("HOME", str(tmp_path))
        with pytest.raises(StorageError, match="Unable to locate credentials.*environment"):
            open_s3(s3_server).get_json("a.json")


@pytest.mark.integration
def test_stopped_server_is_unreachable_until_it_restarts(s3_server, make_folder):
    folder = make_folder({"a": b"1"})
    storage = open_s3(s3_server)
    storage.put_tree(folder, "t")
    s3_server.stop()
    try:
        started = time.monotonic()
        for use in list_uses(storage, folder):
            with pytest.raises(StorageUnreachable, match="no response"):
                use()
        assert time.monotonic() - started < 15
    finally:
        s3_server.start()
    assert not storage.has_tree("t")
    assert storage.put_tree(folder, "t").files == 1
    storage.get_tree("t", folder.with_name("back"))


@contextlib.contextmanager
def unresponsive_port():
    """Yield a port that accepts no connection, because its queue of connections is full."""
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for client in (first, second):
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


@pytest.mark.integration
def test_frozen_or_silent_server_is_unreachable_in_seconds(s3_server, make_folder, tmp_path):
    storage = open_s3(s3_server)
    storage.put_tree(make_folder({"a": b"hanging"}), "t")
    many = make_folder({f"{n}": b"%d" % n for n in range(30)})

    def fails_within(limit_s, use):
        started = time.monotonic()
        with pytest.raises(StorageUnreachable, match="no response"):
            use()
        return time.monotonic() - started < limit_s

    s3_server.freeze()
    try:
        with unresponsive_port() as port:
            silent = Storage("s3://bucket/x", {"endpoint_url": f"http://127.0.0.1:{port}"})
            hanging = lambda: fails_within(20, lambda: storage.put_tree(many, "t"))  # noqa: E731
            assert run_together([hanging, lambda: fails_within(12, lambda: silent.get_json("a.json"))]) == [True, True]
    finally:
        s3_server.thaw()
    storage.get_tree("t", tmp_path / "back")
    assert read_folder(tmp_path / "back") == {"a": b"hanging"}
    assert storage.put_tree(many, "t").files == 30


def test_another_server_with_404_is_not_an_empty_storage(s3_environment, tmp_path):
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


def test_missing_driver_is_reported():
    code = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from orchestrator.islands.storage.storage import Storage; Storage('s3://bucket/x')"
    )
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        "StorageError: s3: storage needs a driver" in completed.stderr
        and "decentralized-diffusion[cloud]" in completed.stderr
    )
