"""Client of an island: whatever a server at its address answers, the error is one of ours; tokens stay confidential."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.config.compute import IslandConfig, ResourcesConfig
from orchestrator.errors import IslandError
from orchestrator.islands.client import IslandClient
from orchestrator.islands.token import read_token

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda values: (
        st.lists(values, max_size=3)
        | st.dictionaries(st.sampled_from(("ray_version", "status", "submission_id", "logs", "x")), values, max_size=3)
    ),
    max_leaves=6,
)


class OddServer(ThreadingHTTPServer):
    """Answers every request with the same status and body, and keeps the tokens that it was sent."""

    status, body, headers = 200, b"", {}

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.tokens: list[str | None] = []


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.tokens.append(self.headers.get("Authorization"))
        self.send_response(self.server.status)
        for name, value in {"Content-Length": str(len(self.server.body)), **self.server.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(self.server.body)

    do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, *_) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[OddServer]:
    server = OddServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def config(server, tmp_path) -> IslandConfig:
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o600)
    return IslandConfig(address=f"http://127.0.0.1:{server.server_port}", token_file=str(token), storage="/tmp")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    status=st.sampled_from((200, 200, 200, 204, 301, 400, 403, 404, 500)),
    body=JSON_VALUES.map(json.dumps) | st.text(max_size=20),
)
def test_odd_answer_is_an_island_error(server, config, tmp_path, status, body):
    server.status, server.body = status, body.encode("utf-8", errors="replace")
    wheel = tmp_path / "x-1.0-py3-none-any.whl"
    wheel.touch()
    client = IslandClient("odd", config)
    calls = {
        "version": client.check_reachable,
        "list": client.list_states,
        "stop": lambda: client.stop("a"),
        "log": lambda: client.fetch_log("a"),
        "submit": lambda: client.submit("a", ["true"], wheel=wheel, resources=ResourcesConfig(), grace_s=1.0),
    }
    for call in calls.values():
        try:
            call()
        except IslandError as error:
            assert "secret" not in str(error) and "\n" not in str(error)


def test_token_does_not_follow_a_redirect(server, config, monkeypatch):
    other = OddServer()
    threading.Thread(target=other.serve_forever, daemon=True).start()
    monkeypatch.setattr(server, "status", 307)
    monkeypatch.setattr(server, "headers", {"Location": f"http://127.0.0.1:{other.server_port}/"})
    with pytest.raises(IslandError):
        IslandClient("odd", config).list_states()
    other.shutdown()
    other.server_close()
    assert not other.tokens and server.tokens[-1] == "Bearer secret"


@pytest.mark.parametrize("content", ["", "two words", "machine a\nlogin b\npassword hunter2", "tök", "\x00\x01"])
def test_file_that_holds_more_than_a_token_is_refused(config, tmp_path, content):
    (tmp_path / "token").write_text(content)
    with pytest.raises(IslandError) as caught:
        read_token("odd", config)
    assert "hunter2" not in str(caught.value) and str(tmp_path / "token") in str(caught.value)


def test_token_is_sent_unencrypted_only_on_request(config, tmp_path):
    address = IslandConfig(address="http://10.0.0.7:8265", token_file=config.token_file, storage="/tmp")
    with pytest.raises(IslandError, match="unencrypted"):
        IslandClient("far", address).list_states()
    allowed = IslandConfig(
        address="http://10.0.0.7:8265", token_file=config.token_file, storage="/tmp", plain_http=True
    )
    assert read_token("far", allowed) == "secret"
