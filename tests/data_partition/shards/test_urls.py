from pathlib import Path

import pytest

from data_partition.errors import UrlRefused
from data_partition.shards.urls import check_url, open_url


@pytest.mark.parametrize(
    "url",
    [
        "pipe:cat /etc/passwd",
        "PIPE:ls",
        "ftp://a/b",
        "ssh://a/b",
        "data:,x",
        "simplecache::s3://a/b",
        "|ls",
        "memory://a",
    ],
)
def test_other_schemes_are_refused(url: str):
    with pytest.raises(UrlRefused, match="is not opened: a data URL is a plain path or starts with"):
        check_url(url)


@pytest.mark.parametrize(
    "url", ["/a/b.tar", "a/b.tar", "file:///a", "s3://b/k", "gs://b/k", "gcs://b/k", "https://h/k"]
)
def test_plain_paths_and_listed_schemes_are_allowed(url: str):
    assert check_url(url) == url


def test_open_url_reads_local_files(tmp_path: Path):
    (tmp_path / "x").write_bytes(b"content")
    for url in (str(tmp_path / "x"), (tmp_path / "x").as_uri()):
        with open_url(url) as file:
            assert file.read() == b"content"
