"""`ddm islands check`: a sound island is all green, and everything that is wrong is named with the way out."""

import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from orchestrator.cli.islands import app
from orchestrator.config.compute import IslandConfig
from orchestrator.errors import ConfigError
from orchestrator.islands.local.clusters import overrides
from orchestrator.islands.preflight import probe
from orchestrator.islands.preflight.check import CHECKS, check_islands
from orchestrator.islands.preflight.local_checks import check_address
from orchestrator.islands.preflight.probe import ProbeReport
from orchestrator.islands.preflight.remote_checks import check_project, check_python, check_remote_clock, check_torch
from orchestrator.islands.preflight.session import SKEW_ERROR_S, SKEW_WARNING_S, PreflightSession, skew_of
from orchestrator.islands.storage.storage import Storage

TOKEN = "0123456789abcdef" * 4


def states(findings, island="island_1"):
    return {finding.check: finding.state for finding in findings if finding.island == island}


def text(findings, check):
    return next(finding.text for finding in findings if finding.check == check)


@contextmanager
def dashboard(*, ahead_s=0.0, release="2.60.0", lets_in=False, status=200):
    """What a Ray dashboard answers, except for what is wrong with it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            has_token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            code = status if has_token or lets_in else 401
            self.send_response_only(code)
            self.send_header("Date", formatdate(time.time() + ahead_s, usegmt=True))
            body = b'{"ray_version": "%s"}' % release.encode()
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def config(tmp_path):
    """An island that nobody has started."""
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    return IslandConfig(address="http://127.0.0.1:9", token_file=str(token), storage=str(tmp_path / "storage"))


def checked(config, timeout_s=30.0):
    return check_islands({"island_1": config}, timeout_s)


def test_an_island_that_does_not_answer_is_named_and_the_rest_is_still_checked(config):
    findings = checked(config)
    found = states(findings)
    assert list(found) == list(CHECKS)
    assert (found["reach"], found["token"], found["job"], found["storage"]) == ("error", "left out", "left out", "ok")
    assert "compute.islands.island_1.address" in text(findings, "reach")


def test_a_token_that_others_can_read(config):
    Path(config.token_file).chmod(0o640)
    findings = checked(config)
    assert states(findings)["token file"] == "error" and "chmod 600" in text(findings, "token file")


def test_a_token_of_somebody_else(config, monkeypatch):
    monkeypatch.setattr("os.getuid", lambda: 12345)
    findings = checked(config)
    assert states(findings)["token file"] == "error" and "12345" in text(findings, "token file")


def test_a_token_that_is_not_there(config):
    Path(config.token_file).unlink()
    findings = checked(config)
    assert states(findings)["token file"] == "error" and config.token_file in text(findings, "token file")


def test_an_island_that_refuses_nobody(config):
    with dashboard(lets_in=True) as address:
        findings = checked(replace(config, address=address))
    assert states(findings)["strangers"] == "error" and "RAY_AUTH_MODE=token" in text(findings, "strangers")


def test_another_release_of_ray(config):
    with dashboard(release="2.31.0") as address:
        findings = checked(replace(config, address=address))
    assert states(findings)["Ray"] == "error" and states(findings)["job"] == "left out"
    assert "2.31.0" in text(findings, "Ray") and version("ray") in text(findings, "Ray")


def test_something_else_at_the_address(config):
    with dashboard(lets_in=True, status=404) as address:
        findings = checked(replace(config, address=address))
    assert states(findings)["reach"] == "error" and "404" in text(findings, "reach")


@pytest.mark.parametrize(
    ("ahead_s", "state"), [(2, "ok"), (-2, "ok"), (12, "warning"), (-12, "warning"), (90, "error")]
)
def test_a_clock_that_is_wrong(config, ahead_s, state):
    with dashboard(ahead_s=ahead_s) as address:
        findings = checked(replace(config, address=address))
    assert states(findings)["clock"] == state
    assert state == "ok" or "NTP" in text(findings, "clock")


@given(st.floats(-1e6, 1e6), st.floats(0, 100))
def test_a_skew_is_judged_by_its_size(seconds, uncertainty_s):
    state = skew_of(seconds, uncertainty_s).state
    assert (state == "error") == (abs(seconds) > SKEW_ERROR_S)
    assert (state == "ok") == (abs(seconds) < SKEW_WARNING_S)


def test_a_storage_that_cannot_be_written(config, tmp_path):
    (tmp_path / "storage").write_text("a file, where a folder should be")
    findings = checked(config)
    assert states(findings)["storage"] == "error" and str(tmp_path / "storage") in text(findings, "storage")


@pytest.mark.parametrize(
    ("address", "state"),
    [
        ("http://127.0.0.1:8265", "ok"),
        ("http://localhost:8265", "ok"),
        ("http://[::1]:8265", "ok"),
        ("https://ray.example.org", "ok"),
        ("http://10.0.0.7:8265", "warning"),
        ("http://ray.example.org", "warning"),
    ],
)
def test_a_token_in_clear(config, address, state):
    assert check_address(PreflightSession("island_1", replace(config, address=address), Path())).state == state


def test_what_the_job_tells_is_compared(config):
    wheel = Path("decentralized_diffusion-1.0+abc-py3-none-any.whl")
    said = ProbeReport(time=1000.0, python="3.9.1", torch="", project="1.0+old")
    visit = PreflightSession("island_1", config, wheel, answers=[said], probed=(1050.0, 1051.0))
    assert [check(visit).state for check in (check_project, check_python, check_torch)] == ["error", "warning", "error"]
    assert check_remote_clock(visit).state == "error" and "behind" in check_remote_clock(visit).text


def test_the_probe_sees_whether_it_has_the_same_storage(tmp_path, capsys):
    here, elsewhere = Storage(str(tmp_path / "here"), {}), str(tmp_path / "elsewhere")
    probe.write_marker(here, "check/1")
    assert probe.probe_report(here, "check/1").storage_error == ""
    assert probe.main(["--storage", elsewhere, "--name", "check/1"]) == 0
    assert "is another place there than here" in capsys.readouterr().out


def test_the_probe_leaves_nothing_in_the_storage(tmp_path):
    probe.try_storage(Storage(str(tmp_path), {}), "check/1")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_configuration_without_islands():
    result = CliRunner().invoke(app, ["check", "compute=inline"])
    assert isinstance(result.exception, ConfigError) and "compute=islands_local" in str(result.exception)


@pytest.mark.slow
def test_sound_islands_are_all_green(islands):
    result = CliRunner().invoke(app, ["check", *overrides(islands.configs, is_usual=False), *addresses(islands)])
    assert result.exit_code == 0, result.output
    assert not any(state in result.output for state in ("warning", "error", "left out"))
    assert all(f" {name} " in result.output for name in (*CHECKS, *islands.configs))


def addresses(islands):
    """The session's islands have free ports, not those of `ddm islands up`."""
    return [f'++compute.islands.{name}.address="{config.address}"' for name, config in islands.configs.items()]


@pytest.mark.slow
def test_the_token_of_another_island_and_too_few_cpus(islands):
    one, two = islands.configs.values()
    wrong = {"island_1": replace(one, token_file=two.token_file), "island_2": replace(two, cpus=64)}
    findings = check_islands(wrong, 60.0)
    assert states(findings)["token"] == "error" and states(findings)["job"] == "left out"
    assert "wrong or expired" in text(findings, "token")
    assert states(findings, "island_2")["resources"] == "warning"
    assert {state for state in states(findings, "island_2").values()} == {"ok", "warning"}


@pytest.mark.slow
def test_a_frozen_island_delays_neither_the_other_nor_the_answer(islands, config):
    with dashboard(release="2.31.0") as other:
        islands.freeze("island_1")
        try:
            started = time.monotonic()
            both = {"island_1": islands.configs["island_1"], "island_2": replace(config, address=other)}
            findings = check_islands(both, 4.0)
            assert time.monotonic() - started < 7.0
        finally:
            islands.thaw("island_1")
    assert list(states(findings, "island_2")) == list(CHECKS)
    assert states(findings)["reach"] == "error" and "within 4 s" in text(findings, "reach")
