"""Tars from a server that refuses, breaks off or is slow to come up; and signed URLs, whose query stays a secret."""

import http.server
import json
import logging
import socket
import struct
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from braceexpand import braceexpand

from data_partition.config import DataConfig
from data_partition.datasets import webdataset_source
from data_partition.datasets.webdataset_source import read_urls
from data_partition.errors import AccessDenied, MissingExtra, SourceMissing, SourceUnreachable, UrlRefused
from data_partition.shards.images import encode_png
from ddm_core.url_queries import hide_queries, reveal_query, without_secrets
from tests.data_partition.shards.test_tar import make_tar

NUM_SAMPLES = 30
TAR = make_tar(
    {
        f"{row:02d}.png": encode_png(np.random.default_rng(row).integers(0, 256, (8, 8, 3), np.uint8))
        for row in range(30)
    }
).getvalue()
SECRET = "X-Signature=SECRET123"


class FailingHandler(http.server.BaseHTTPRequestHandler):
    """`/503/2/a.tar` fails twice with status 503; `cut`, `reset` and `chunked` break off in the middle."""

    requests: Counter[str] = Counter()

    def do_GET(self) -> None:
        kind, times = self.path.split("/")[1:3]
        self.requests[self.path] += 1
        failing = self.requests[self.path] <= int(times)
        if failing and kind.isdigit():
            self.send_error(int(kind))
        elif failing and kind == "redirect":
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
            self.end_headers()
        else:
            self.send_body(kind if failing else "whole")

    def send_body(self, kind: str) -> None:
        self.send_response(200)
        if kind == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(TAR)))
        self.end_headers()
        if kind == "chunked":
            self.wfile.write(b"%x\r\n" % len(TAR) + TAR[:10_000])
        else:
            self.wfile.write(TAR if kind == "whole" else TAR[:10_000])
        if kind == "reset":
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name in the base class
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(webdataset_source, "RETRY_AFTER_S", (0.0, 0.0))
    monkeypatch.setattr(FailingHandler, "requests", Counter())
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FailingHandler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def read_keys(path: str) -> list[str]:
    return [sample.key for sample in read_urls(path, DataConfig(labels=False))]


EXPECTED = {
    "401": (AccessDenied, "HTTP 401 Unauthorized"),
    "403": (AccessDenied, "HTTP 403 Forbidden; make a new signed URL"),
    "404": (SourceMissing, "HTTP 404 Not Found; correct data.path"),
    "410": (SourceMissing, "HTTP 410 Gone"),
    "429": (SourceUnreachable, "HTTP 429 Too Many Requests"),
    "500": (SourceUnreachable, "HTTP 500 Internal Server Error"),
    "503": (SourceUnreachable, "HTTP 503 Service Unavailable"),
    "cut": (SourceUnreachable, "cannot be read .*IncompleteRead"),
    "chunked": (SourceUnreachable, "cannot be read "),
    "reset": (SourceUnreachable, "cannot be read "),
    "redirect": (UrlRefused, "redirects to a URL that is not opened"),
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_every_failure_of_a_server_is_named(server: str, kind: str, caplog: pytest.LogCaptureFixture):
    error, message = EXPECTED[kind]
    caplog.set_level(logging.INFO)
    with pytest.raises(error, match=message) as caught:
        read_keys(f"{server}/{kind}/99/a.tar?{SECRET}")
    assert "/a.tar?…" in str(caught.value) and "glob" not in str(caught.value)
    assert "SECRET123" not in "".join(traceback.format_exception(caught.value)) + caplog.text
    assert sum(FailingHandler.requests.values()) == (3 if error is SourceUnreachable else 1)


@pytest.mark.parametrize("kind", ["503", "cut", "chunked", "reset"])
def test_passing_failure_loses_and_repeats_no_sample(server: str, kind: str):
    assert read_keys(f"{server}/{kind}/2/a.tar") == read_keys(f"{server}/ok/0/a.tar")
    assert len(read_keys(f"{server}/{kind}/1/a.tar?again")) == NUM_SAMPLES


def test_server_that_is_not_there_is_unreachable(server: str):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(SourceUnreachable, match=r"a\.tar\?… cannot be read \(ConnectionError") as caught:
            read_keys(f"http://127.0.0.1:{unused.getsockname()[1]}/a.tar?{SECRET}")
    assert "SECRET123" not in "".join(traceback.format_exception(caught.value))


def test_missing_credentials_and_drivers_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    pytest.importorskip("s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(AccessDenied, match="s3://bucket/a.tar may not be read .*credentials"):
        read_keys("s3://bucket/a.tar")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(MissingExtra, match=r"gs://bucket/a.tar needs a driver .*decentralized-diffusion\[cloud\]"):
        read_keys("gs://bucket/a.tar")


def test_query_of_a_signed_url_is_in_no_configuration(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("DDM_HOME", str(tmp_path / "home"))
    config = DataConfig(source="webdataset", path=f"{server}/ok/0/{{a,b}}.tar?{SECRET}", labels=False)
    assert "SECRET123" not in json.dumps(config.path)
    assert DataConfig(source="webdataset", path=config.path, labels=False) == config
    assert len(list(read_urls(config.path, config))) == 2 * NUM_SAMPLES
    assert FailingHandler.requests[f"/ok/0/b.tar?{SECRET}"] == 1
    with pytest.raises(AccessDenied, match="is not on this machine"):
        read_keys(str(config.path).replace("127.0.0.1", "localhost"))
    (stored,) = (tmp_path / "home" / "queries").iterdir()
    assert stored.stat().st_mode & 0o777 == 0o600
    stored.unlink()
    with pytest.raises(AccessDenied, match="is not on this machine .*give data.path with the whole URL again"):
        read_keys(str(config.path))


@pytest.mark.parametrize(
    "url",
    ["https://h/a.tar?x=1,2&y='", "s3://b/a.tar", "{http://h/a?x=1,http://h/b?y=2}.tar", "http://u:p@h/a{0..1}?q"],
)
def test_hidden_queries_come_back(url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("DDM_HOME", str(tmp_path))
    hidden = hide_queries(url)
    assert hide_queries(hidden) == hidden
    assert not any(part in hidden for part in ("x=1", "y=", "?q"))
    assert not any(part in without_secrets(hidden) for part in ("hidden", "u:p"))
    assert [reveal_query(part) for part in braceexpand(hidden)] == list(braceexpand(url))
