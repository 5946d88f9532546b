"""The webhook on a real server on loopback: what arrives, what never leaves, and a server that fails."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rich.console import Console

from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import NotifyConfig, TrackingConfig, parse_config
from orchestrator.controller import run_pipeline
from orchestrator.errors import IslandError
from orchestrator.reporting.tracking.process import notify_of
from orchestrator.reporting.tracking.webhook import describe
from orchestrator.run.run_folder import RunFolder
from tests.laws.conftest import TINY


@contextlib.contextmanager
def webhook(folder, status=200):
    """Yield the settings of a webhook on loopback, and what it receives."""
    received = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = folder / "webhook"
        address.touch(mode=0o600)
        address.write_text(f"http://127.0.0.1:{server.server_address[1]}/secret")
        yield NotifyConfig(webhook_file=str(address)), received
        server.shutdown()


def started_run(folder, notify):
    config = replace(
        parse_config(compose(TINY)), folder=str(folder), notify=notify, wandb=TrackingConfig(mode="disabled")
    )
    folder.mkdir()
    RunFolder(folder).save_config(config)
    return RunFolder(folder), config


def test_a_finished_run_is_reported_once(tmp_path):
    with webhook(tmp_path) as (notify, received):
        run, config = started_run(tmp_path / "run", notify)
        run_pipeline(config, Console(file=io.StringIO()))
    assert [message["event"] for message in received] == ["finished"]
    assert received[0]["run"] == str(run.root) and "every stage is finished" in received[0]["text"]
    assert not any(b"/secret" in path.read_bytes() for path in run.root.rglob("*") if path.is_file())


def test_failures_are_one_warning_without_the_address(tmp_path):
    with webhook(tmp_path, status=500) as (notify, received):
        run, _ = started_run(tmp_path / "run", notify)
        warnings = []
        with notify_of(run, notify, warnings.append):
            run.record("run_ended", submitted=1, failed={}, stopped=False)
    assert len(received) == 3 and len(warnings) == 1
    assert "HTTP 500" in warnings[0] and "secret" not in warnings[0]


def test_a_killed_controller_is_reported(tmp_path):
    code = f"""
import time
from pathlib import Path
from orchestrator.reporting.tracking.process import notify_of
from orchestrator.run.run_folder import RunFolder
run = RunFolder(Path({str(tmp_path / "run")!r}))
with notify_of(run, run.load_config().notify, print):
    print("begun", flush=True)
    time.sleep(60)
"""
    with webhook(tmp_path) as (notify, received):
        started_run(tmp_path / "run", notify)
        controller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert controller.stdout.readline() == b"begun\n"
        os.kill(controller.pid, signal.SIGKILL)
        controller.communicate()
        deadline = time.monotonic() + 60
        while not received and time.monotonic() < deadline:
            time.sleep(0.1)
    assert [message["event"] for message in received] == ["controller_lost"]


@pytest.mark.parametrize(
    ("mode", "text", "message"),
    [
        (0o644, "https://example.com/x", "chmod 600"),
        (0o600, "http://example.com/x", "must hold an https address"),
        (0o600, "", "is empty"),
    ],
)
def test_an_unsafe_address_is_refused_before_the_run(tmp_path, mode, text, message):
    address = tmp_path / "webhook"
    address.write_text(text)
    address.chmod(mode)
    run, config = started_run(tmp_path / "run", NotifyConfig(webhook_file=str(address)))
    with pytest.raises(IslandError, match=message):
        run_pipeline(config, Console(file=io.StringIO()))
    assert not run.attempted_stages()


def test_events_of_the_journal_have_names():
    events = [
        {"event": "submitted", "stage": "expert_0"},
        {"event": "unreachable", "island": "spot"},
        {"event": "left_out", "stage": "expert_1"},
        {"event": "budget_reached", "text": "1 of 1"},
        {"event": "run_ended", "failed": {"router": "x"}, "stopped": False},
        {"event": "run_ended", "failed": {}, "stopped": True},
    ]
    names = [name for name, _ in describe(events, parse_config(compose(TINY)))]
    assert names == ["island_lost", "expert_lost", "budget_reached", "failed", "stopped"]
