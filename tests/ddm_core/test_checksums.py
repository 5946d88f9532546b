import hashlib
import os
import time

import pytest

from ddm_core.files import checksums
from ddm_core.files.checksums import SETTLED_NS, checksum


@pytest.fixture
def reads(monkeypatch):
    """Return the names of files that are read."""
    names, digest = [], hashlib.file_digest
    monkeypatch.setattr(
        checksums.hashlib, "file_digest", lambda file, kind: names.append(file.name) or digest(file, kind)
    )
    return names


def write_long_ago(path, content, seconds=60):
    path.write_bytes(content)
    written = time.time_ns() - seconds * 10**9
    os.utime(path, ns=(written, written))


def test_file_and_its_links_are_read_once(tmp_path, reads):
    write_long_ago(tmp_path / "a", b"some bytes")
    os.link(tmp_path / "a", tmp_path / "b")
    digests = {checksum(tmp_path / name) for name in ("a", "a", "b")}
    assert digests == {hashlib.sha256(b"some bytes").hexdigest()}
    assert len(reads) == 1


def test_file_that_is_written_again_is_read_again(tmp_path):
    write_long_ago(tmp_path / "a", b"some bytes", seconds=60)
    first = checksum(tmp_path / "a")
    write_long_ago(tmp_path / "a", b"same size!", seconds=30)
    assert checksum(tmp_path / "a") == hashlib.sha256(b"same size!").hexdigest() != first


def test_fresh_file_is_read_each_time(tmp_path, reads):
    """Two writings within the resolution of a file system's clock have the same time."""
    path = tmp_path / "a"
    path.write_bytes(b"one")
    status = path.stat()
    assert checksum(path) == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"two")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert time.time_ns() - status.st_mtime_ns < SETTLED_NS
    assert checksum(path) == hashlib.sha256(b"two").hexdigest()
    assert len(reads) == 2
