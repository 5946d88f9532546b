import io
import itertools
import os
import tarfile
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_partition.errors import ShardError
from data_partition.shards import tar as tar_module
from data_partition.shards.tar import expand_urls, read_tar


def make_tar(files: Mapping[str, bytes], mode: str = "w") -> io.BytesIO:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    buffer.seek(0)
    return buffer


def test_webdataset_secure_mode_is_on():
    assert tar_module._webdataset().utils.enforce_security
    assert os.environ["WDS_SECURE"] == "1"


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_members_are_grouped_by_key(mode: str):
    files = {"a/x.png": b"1", "a/x.cls": b"2", "a/y.seg.png": b"3"}
    files_by_key = {sample.key: sample.files for sample in read_tar(make_tar(files, mode), "t")}
    assert files_by_key == {"a/x": {"png": b"1", "cls": b"2"}, "a/y": {"seg.png": b"3"}}


@pytest.mark.parametrize("name", ["../x.png", "/etc/x.png", "a/../../x.png"])
def test_member_name_outside_its_folder_raises(name: str):
    with pytest.raises(ShardError, match="hostile.tar.*points outside its folder"):
        list(read_tar(make_tar({name: b""}), "hostile.tar"))


def test_large_member_raises_before_it_is_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tar_module, "MAX_SAMPLE_BYTES", 522)
    assert len(list(read_tar(make_tar({"x.png": b"0" * 10}), "t"))) == 1
    with pytest.raises(ShardError, match="claims 523 bytes, at most 522"):
        list(read_tar(make_tar({"x.png": b"0" * 11}), "t"))


def make_tar_of(*names: str) -> io.BytesIO:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize(
    ("names", "first", "second"),
    [
        (["x.png", "y.png", "x.cls"], "x.png", "x.cls"),
        (["a/x.png", "a/y.png", "a/x.png"], "a/x.png", "a/x.png"),
        (["./x.png", "y.png", "x.png"], "x.png", "x.png"),
        (["caf\udce9.png", "y.png", "caf\\udce9.png"], "caf.*udce9.png", "caf.*udce9.png"),
    ],
)
def test_key_in_two_places_raises(names: list[str], first: str, second: str):
    with pytest.raises(ShardError, match=f"is in two places, at '{first}' and at '{second}' after other samples"):
        list(read_tar(make_tar_of(*names), "t"))


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["png", "cls", "txt"])), max_size=8))
def test_every_member_is_in_its_sample_or_the_tar_is_refused(members: list[tuple[str, str]]):
    try:
        samples = list(read_tar(make_tar_of(*(f"{key}.{extension}" for key, extension in members)), "t"))
    except ShardError as error:
        runs = [key for key, _ in itertools.groupby(key for key, _ in members)]
        assert len(set(members)) < len(members) or len(set(runs)) < len(runs), error
        return
    assert [(sample.key, extension) for sample in samples for extension in sample.files] == members


def test_files_of_no_sample_are_yielded_without_content():
    samples = list(read_tar(make_tar_of("README", "a/x.png", "a/.hidden.png", "a/x.cls"), "t"))
    assert [(sample.key, sorted(sample.files)) for sample in samples] == [
        ("README", []),
        ("a/.hidden.png", []),
        ("a/x", ["cls", "png"]),
    ]


def test_duplicate_member_name_raises():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("x.png"), io.BytesIO())
    buffer.seek(0)
    with pytest.raises(ShardError, match="duplicate"):
        list(read_tar(buffer, "t"))


@pytest.mark.parametrize("keep", [0, 10, 40])
def test_truncated_gzip_raises(keep: int):
    data = make_tar({"x.png": os.urandom(5000)}, "w:gz").getvalue()
    with pytest.raises(ShardError, match="shard t cannot be read"):
        list(read_tar(io.BytesIO(data[:keep]), "t"))


def test_tar_without_end_mark_raises():
    data = make_tar({"x.png": b"1"}).getvalue()
    with pytest.raises(ShardError, match="ends too early"):
        list(read_tar(io.BytesIO(data[:1024]), "t"))


def test_every_damaged_header_raises():
    """tarfile itself would treat it as the end of the file."""
    intact = make_tar({f"{number}.png": b"1" for number in range(4)}).getvalue()
    for block in range(0, 4 * 1024, 1024):
        damaged = intact[:block] + b"\xff" * 20 + intact[block + 20 :]
        with pytest.raises(ShardError, match="shard t cannot be read"):
            list(read_tar(io.BytesIO(damaged), "t"))


def test_braces_expand():
    assert expand_urls("s3://b/a-{08..10}.tar") == ["s3://b/a-08.tar", "s3://b/a-09.tar", "s3://b/a-10.tar"]
