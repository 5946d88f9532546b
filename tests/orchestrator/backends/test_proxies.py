"""Proxy variables of a company's machine: this machine's own addresses never go through a proxy."""

import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.backends.proxies import PROXY_VARIABLES, bypass_proxies_on_loopback, describe_proxy
from orchestrator.config.compute import IslandConfig
from orchestrator.errors import Unreachable
from orchestrator.islands.client import IslandClient
from orchestrator.islands.preflight.session import PreflightSession

NAMES = [name for variable in PROXY_VARIABLES for name in (variable, variable.upper())]
CLOSED = "http://127.0.0.1:9"


def clear(monkeypatch):
    for name in (*NAMES, "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8265", "http://127.0.1.7:8265", "http://localhost:1/", "https://[::1]:2"]
)
@pytest.mark.parametrize("name", NAMES)
def test_this_machine_is_reached_directly(url, name, monkeypatch):
    clear(monkeypatch)
    monkeypatch.setenv(name, CLOSED)
    bypass_proxies_on_loopback()
    assert requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url)) is None


@given(lower=st.lists(st.sampled_from(["a.example", "b.example"])), upper=st.lists(st.sampled_from(["c.example"])))
def test_given_exceptions_are_kept(lower, upper):
    with pytest.MonkeyPatch.context() as monkeypatch:
        clear(monkeypatch)
        monkeypatch.setenv("HTTP_PROXY", CLOSED)
        monkeypatch.setenv("no_proxy", ",".join(lower))
        monkeypatch.setenv("NO_PROXY", ", ".join(upper))
        bypass_proxies_on_loopback()
        bypass_proxies_on_loopback()
        assert os.environ["no_proxy"] == os.environ["NO_PROXY"]
        entries = os.environ["no_proxy"].split(",")
        assert {*lower, *upper, "127.0.0.1"} <= set(entries) and len(entries) == len(set(entries))


def test_environment_without_a_proxy_is_left_alone(monkeypatch):
    clear(monkeypatch)
    bypass_proxies_on_loopback()
    assert "no_proxy" not in os.environ and "NO_PROXY" not in os.environ
    assert describe_proxy("https://island.example:8265") == ""


def test_unreachable_island_behind_a_proxy_names_the_variable(tmp_path, monkeypatch):
    clear(monkeypatch)
    monkeypatch.setenv("HTTPS_PROXY", "http://user:secret@127.0.0.1:9")
    token = tmp_path / "token"
    token.write_text("t" * 32)
    token.chmod(0o600)
    config = IslandConfig(address="https://island.example:8265", token_file=str(token), storage=str(tmp_path))
    with pytest.raises(Unreachable, match=r"proxy in HTTPS_PROXY: .* add island\.example to no_proxy") as caught:
        IslandClient("far", config).list_states()
    assert "secret" not in str(caught.value)
    with pytest.raises(Unreachable, match=r"proxy in HTTPS_PROXY: .* add island\.example to no_proxy"):
        PreflightSession("far", config, tmp_path).send_request("/api/version", None)


def test_check_of_an_island_on_this_machine_bypasses_the_proxy(tmp_path, monkeypatch):
    clear(monkeypatch)
    monkeypatch.setenv("http_proxy", CLOSED)
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.handle_request).start()
        config = IslandConfig(
            address=f"http://127.0.0.1:{server.server_port}", token_file="none", storage=str(tmp_path)
        )
        assert PreflightSession("near", config, tmp_path).send_request("/", None).status_code == 501
