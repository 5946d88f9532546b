"""`ddm islands check`: a healthy island passes every check, and each fault is reported with its remedy."""

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

from orchestrator.cli.machines.islands import app
from orchestrator.config.compute import IslandConfig
from orchestrator.errors import ConfigError
from orchestrator.islands.local.clusters import build_overrides
from orchestrator.islands.preflight import probe
from orchestrator.islands.preflight.check import CHECKS, check_islands
from orchestrator.islands.preflight.local_checks import check_address
from orchestrator.islands.preflight.probe import ProbeReport
from orchestrator.islands.preflight.remote_checks import check_project, check_python, check_remote_clock, check_torch
from orchestrator.islands.preflight.session import SKEW_ERROR_S, SKEW_WARNING_S, PreflightSession, judge_clock_skew
from orchestrator.islands.storage.storage import Storage

TOKEN = "0123456789abcdef" * 4


def get_states(findings, island="island_1"):
    return {finding.check: finding.state for finding in findings if finding.island == island}


def get_text(findings, check):
    return next(finding.text for finding in findings if finding.check == check)


@contextmanager
def fake_dashboard(*, ahead_s=0.0, release="2.60.0", accepts_all=False, status=200):
    """Serve the responses of a Ray dashboard, with the given faults."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            has_token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            code = status if has_token or accepts_all else 401
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
    """Return an island that is not running."""
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    return IslandConfig(address="http://127.0.0.1:9", token_file=str(token), storage=str(tmp_path / "storage"))


def run_checks(config, timeout_s=30.0):
    return check_islands({"island_1": config}, timeout_s)


def test_check_of_unreachable_island_still_checks_storage(config):
    findings = run_checks(config)
    states = get_states(findings)
    assert list(states) == list(CHECKS)
    assert (states["reach"], states["token"], states["job"], states["storage"]) == (
        "error",
        "left out",
        "left out",
        "ok",
    )
    assert "compute.islands.island_1.address" in get_text(findings, "reach")


def test_check_with_token_readable_by_others_fails(config):
    Path(config.token_file).chmod(0o640)
    findings = run_checks(config)
    assert get_states(findings)["token file"] == "error" and "chmod 600" in get_text(findings, "token file")


def test_check_with_token_of_another_user_fails(config, monkeypatch):
    monkeypatch.setattr("os.getuid", lambda: 12345)
    findings = run_checks(config)
    assert get_states(findings)["token file"] == "error" and "12345" in get_text(findings, "token file")


def test_check_with_missing_token_file_fails(config):
    Path(config.token_file).unlink()
    findings = run_checks(config)
    assert get_states(findings)["token file"] == "error" and config.token_file in get_text(findings, "token file")


def test_check_of_island_without_authentication_fails(config):
    with fake_dashboard(accepts_all=True) as address:
        findings = run_checks(replace(config, address=address))
    assert get_states(findings)["authentication"] == "error" and "RAY_AUTH_MODE=token" in get_text(
        findings, "authentication"
    )


def test_check_of_another_ray_version_fails(config):
    with fake_dashboard(release="2.31.0") as address:
        findings = run_checks(replace(config, address=address))
    assert get_states(findings)["Ray"] == "error" and get_states(findings)["job"] == "left out"
    assert "2.31.0" in get_text(findings, "Ray") and version("ray") in get_text(findings, "Ray")


def test_check_of_another_server_at_the_address_fails(config):
    with fake_dashboard(accepts_all=True, status=404) as address:
        findings = run_checks(replace(config, address=address))
    assert get_states(findings)["reach"] == "error" and "404" in get_text(findings, "reach")


@pytest.mark.parametrize(
    ("ahead_s", "state"), [(2, "ok"), (-2, "ok"), (12, "warning"), (-12, "warning"), (90, "error")]
)
def test_check_of_clock_depends_on_skew(config, ahead_s, state):
    with fake_dashboard(ahead_s=ahead_s) as address:
        findings = run_checks(replace(config, address=address))
    assert get_states(findings)["clock"] == state
    assert state == "ok" or "NTP" in get_text(findings, "clock")


@given(st.floats(-1e6, 1e6), st.floats(0, 100))
def test_clock_skew_state_depends_on_its_size(seconds, uncertainty_s):
    state = judge_clock_skew(seconds, uncertainty_s).state
    assert (state == "error") == (abs(seconds) > SKEW_ERROR_S)
    assert (state == "ok") == (abs(seconds) < SKEW_WARNING_S)


def test_check_of_storage_that_is_not_writable_fails(config, tmp_path):
    (tmp_path / "storage").write_text("a file, where a folder should be")
    findings = run_checks(config)
    assert get_states(findings)["storage"] == "error" and str(tmp_path / "storage") in get_text(findings, "storage")


@pytest.mark.parametrize(
    ("address", "state"),
    [
        ("http://127.0.0.1:8265", "ok"),
        ("http://localhost:8265", "ok"),
        ("http://[::1]:8265", "ok"),
        ("https://ray.example.org", "ok"),
        ("http://10.0.0.7:8265", "error"),
        ("http://ray.example.org", "error"),
        ("http://localhost.example.org", "error"),
    ],
)
def test_check_of_address_refuses_unencrypted_token(config, address, state):
    config = replace(config, address=address)
    assert check_address(PreflightSession("island_1", config, Path())).state == state
    allowed = check_address(PreflightSession("island_1", replace(config, plain_http=True), Path())).state
    assert allowed == ("ok" if state == "ok" else "warning")


def test_check_of_probe_report_compares_versions_and_clock(config):
    wheel = Path("decentralized_diffusion-1.0+abc-py3-none-any.whl")
    report = ProbeReport(time=1000.0, python="3.9.1", torch="", project="1.0+old")
    session = PreflightSession("island_1", config, wheel, probe_reports=[report], job_end_times=(1050.0, 1051.0))
    assert [check(session).state for check in (check_project, check_python, check_torch)] == [
        "error",
        "warning",
        "error",
    ]
    assert check_remote_clock(session).state == "error" and "behind" in check_remote_clock(session).text


def test_probe_in_another_storage_reports_it(tmp_path, capsys):
    storage, other_url = Storage(str(tmp_path / "storage"), {}), str(tmp_path / "other")
    probe.write_marker(storage, "check/1")
    assert probe.build_report(storage, "check/1").storage_error == ""
    assert probe.main(["--storage", other_url, "--name", "check/1"]) == 0
    assert "is another place on the island than on the controller" in capsys.readouterr().out


def test_probe_leaves_no_file_in_the_storage(tmp_path):
    probe.try_storage(Storage(str(tmp_path), {}), "check/1")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_check_without_islands_raises():
    result = CliRunner().invoke(app, ["check", "compute=inline"])
    assert isinstance(result.exception, ConfigError) and "compute=islands_local" in str(result.exception)


@pytest.mark.integration
def test_check_of_healthy_islands_passes(islands):
    result = CliRunner().invoke(
        app, ["check", *build_overrides(islands.configs, in_default_folder=False), *address_overrides(islands)]
    )
    assert result.exit_code == 0, result.output
    assert not any(state in result.output for state in ("warning", "error", "left out"))
    assert all(f" {name} " in result.output for name in (*CHECKS, *islands.configs))


def address_overrides(islands):
    """Return overrides for the session's islands, whose ports differ from those of `ddm islands up`."""
    return [f'++compute.islands.{name}.address="{config.address}"' for name, config in islands.configs.items()]


@pytest.mark.integration
def test_check_of_swapped_token_and_too_few_cpus_reports_both(islands):
    first, second = islands.configs.values()
    wrong = {"island_1": replace(first, token_file=second.token_file), "island_2": replace(second, cpus=64)}
    findings = check_islands(wrong, 60.0)
    assert get_states(findings)["token"] == "error" and get_states(findings)["job"] == "left out"
    assert "wrong or expired" in get_text(findings, "token")
    assert get_states(findings, "island_2")["resources"] == "warning"
    assert {state for state in get_states(findings, "island_2").values()} == {"ok", "warning"}


@pytest.mark.integration
def test_check_of_frozen_island_ends_in_time(islands, config):
    with fake_dashboard(release="2.31.0") as other_address:
        islands.freeze("island_1")
        try:
            started = time.monotonic()
            both = {"island_1": islands.configs["island_1"], "island_2": replace(config, address=other_address)}
            findings = check_islands(both, 4.0)
            assert time.monotonic() - started < 7.0
        finally:
            islands.thaw("island_1")
    assert list(get_states(findings, "island_2")) == list(CHECKS)
    assert get_states(findings)["reach"] == "error" and "within 4 s" in get_text(findings, "reach")
