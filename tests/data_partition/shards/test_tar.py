import io
import os
import tarfile
from collections.abc import Mapping

import pytest

from data_partition.errors import ShardError
from data_partition.shards import tar as tars
from data_partition.shards.tar import expand_urls, read_tar


def tar_of(files: Mapping[str, bytes], mode: str = "w") -> io.BytesIO:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    buffer.seek(0)
    return buffer


def test_secure_mode_is_on():
    assert os.environ["WDS_SECURE"] == "1"
    assert tars.webdataset.utils.enforce_security


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_members_are_grouped_by_key(mode: str):
    files = {"a/x.png": b"1", "a/x.cls": b"2", "a/y.seg.png": b"3"}
    found = {each.key: each.files for each in read_tar(tar_of(files, mode), "t")}
    assert found == {"a/x": {"png": b"1", "cls": b"2"}, "a/y": {"seg.png": b"3"}}


@pytest.mark.parametrize("name", ["../x.png", "/etc/x.png", "a/../../x.png"])
def test_names_cannot_leave_their_folder(name: str):
    with pytest.raises(ShardError, match="hostile.tar.*points out of its folder"):
        list(read_tar(tar_of({name: b""}), "hostile.tar"))


def test_a_large_member_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tars, "MAX_SAMPLE_BYTES", 522)
    assert len(list(read_tar(tar_of({"x.png": b"0" * 10}), "t"))) == 1
    with pytest.raises(ShardError, match="claims 523 bytes, at most 522"):
        list(read_tar(tar_of({"x.png": b"0" * 11}), "t"))


def test_a_name_given_twice_is_an_error():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("x.png"), io.BytesIO())
    buffer.seek(0)
    with pytest.raises(ShardError, match="duplicate"):
        list(read_tar(buffer, "t"))


@pytest.mark.parametrize("keep", [0, 10, 40])
def test_a_truncated_gzip_is_an_error(keep: int):
    data = tar_of({"x.png": os.urandom(5000)}, "w:gz").getvalue()
    with pytest.raises(ShardError, match="shard t cannot be read"):
        list(read_tar(io.BytesIO(data[:keep]), "t"))


def test_a_tar_without_its_end_mark_is_an_error():
    data = tar_of({"x.png": b"1"}).getvalue()
    with pytest.raises(ShardError, match="ends too early"):
        list(read_tar(io.BytesIO(data[:1024]), "t"))


def test_every_damaged_header_is_an_error():
    """tarfile itself would take it for the end of the file."""
    whole = tar_of({f"{number}.png": b"1" for number in range(4)}).getvalue()
    for block in range(0, 4 * 1024, 1024):
        damaged = whole[:block] + b"\xff" * 20 + whole[block + 20 :]
        with pytest.raises(ShardError, match="shard t cannot be read"):
            list(read_tar(io.BytesIO(damaged), "t"))


def test_braces_expand():
    assert expand_urls("s3://b/a-{08..10}.tar") == ["s3://b/a-08.tar", "s3://b/a-09.tar", "s3://b/a-10.tar"]
