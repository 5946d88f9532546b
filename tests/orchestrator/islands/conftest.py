"""Fixtures: storages (a local folder, and a real S3 server on loopback) and islands on this machine."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.islands.local.clusters import LocalIslands
from orchestrator.islands.storage.storage import Storage
from orchestrator.islands.wheel import build_wheel


class S3Server:
    """An S3 server process that can be frozen, stopped and started again at the same address."""

    def __init__(self) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        """Start the server with one empty bucket."""
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(300):
            try:
                self.call("PUT", "/bucket")
            except OSError:
                time.sleep(0.1)
            else:
                return
        raise RuntimeError("the S3 server did not start")

    def call(self, method: str, path: str, body: bytes = b"") -> None:
        """Send one request without credentials."""
        headers = {"Content-Type": "text/plain"}
        request = urllib.request.Request(self.endpoint + path, data=body, method=method, headers=headers)
        with urllib.request.urlopen(request, timeout=5):
            pass

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def s3_environment() -> Iterator[pytest.MonkeyPatch]:
    """Set test credentials in the environment, where real ones are read from."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield patch


@pytest.fixture(scope="session")
def s3_server(s3_environment: pytest.MonkeyPatch) -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.stop()


@dataclass
class StorageKind:
    """A kind of storage, with a base URL and options."""

    kind: str
    base: str
    options: dict[str, str]

    def new_url(self) -> str:
        """Return the URL of an unused storage."""
        return f"{self.base}/{uuid.uuid4().hex[:8]}"

    def open(self, url: str = "") -> Storage:
        """Open a storage with no cached state."""
        return Storage(url or self.new_url(), self.options)


@pytest.fixture(scope="session")
def local_storage(tmp_path_factory: pytest.TempPathFactory) -> StorageKind:
    return StorageKind("local", str(tmp_path_factory.mktemp("storage")), {})


@pytest.fixture(scope="session")
def s3_storage(s3_server: S3Server) -> StorageKind:
    return StorageKind("s3", "s3://bucket", {"endpoint_url": s3_server.endpoint})


@pytest.fixture(scope="session", params=["local", "s3"])
def storage_kind(request: pytest.FixtureRequest) -> StorageKind:
    """Return each kind of storage in turn."""
    return request.getfixturevalue(f"{request.param}_storage")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a file system of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs (root)")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[[dict[str, bytes]], Path]:
    """Return a function that creates a folder with the given files."""

    def make(files: dict[str, bytes]) -> Path:
        folder = tmp_path / uuid.uuid4().hex[:8]
        folder.mkdir()
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder

    return make


@pytest.fixture(scope="session")
def islands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalIslands]:
    """Yield two Ray clusters on this machine for the session; a test that kills or freezes one restores it."""
    with LocalIslands(tmp_path_factory.mktemp("islands")) as local_islands:
        yield local_islands


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel that is sent to islands."""
    return build_wheel(tmp_path_factory.mktemp("wheel"))
