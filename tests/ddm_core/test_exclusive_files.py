"""One of several processes creates a file, with and without hard links."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from ddm_core.files.exclusive_files import create_once


@pytest.mark.parametrize("error", [None, errno.EPERM, errno.ENOSYS])
def test_one_of_many_creates_a_file(tmp_path, monkeypatch, error):
    def refuse(source, target):
        raise OSError(error, os.strerror(error))

    if error is not None:
        monkeypatch.setattr(os, "link", refuse)

    def create(number: int) -> bool:
        return create_once(tmp_path / "claim", str(number).encode(), tmp_path / f".{number}")

    with ThreadPoolExecutor(8) as pool:
        winners = [number for number, has_won in enumerate(pool.map(create, range(40))) if has_won]
    assert [(tmp_path / "claim").read_text()] == [str(number) for number in winners]
    assert [path.name for path in tmp_path.iterdir()] == ["claim"]


def test_other_errors_of_the_disk_are_raised(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(OSError, match="No space"):
        create_once(tmp_path / "claim", b"", tmp_path / ".candidate")
    assert not list(tmp_path.iterdir())
