"""Tracking with servers that refuse, never answer or fail: the run ends as without them, with one warning."""

import contextlib
import importlib.util
import io
import json
import re
import socket
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from ddm_core.artifacts import write_text
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import TrackingConfig, parse_config
from orchestrator.controller import run_pipeline
from orchestrator.errors import ConfigError
from orchestrator.pipeline.graph import build_graph
from orchestrator.pipeline.stage import STEP_SAMPLES, VALIDATION
from orchestrator.reporting.tracking.process import track_run
from orchestrator.reporting.tracking.tracker import MAX_GROUP_LENGTH, require_account, safe_name
from orchestrator.run.run_folder import RunFolder
from tests.laws.conftest import TINY

ONLINE = TrackingConfig(mode="online", finish_s=2.0)


class Failing(BaseHTTPRequestHandler):
    """Answers everything with an internal error."""

    def do_POST(self) -> None:
        self.send_error(500)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serve(kind: str) -> Iterator[str]:
    if kind == "failing":
        with ThreadingHTTPServer(("127.0.0.1", 0), Failing) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_address[1]}"
            server.shutdown()
        return
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if kind == "silent":
            listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture(params=["refusing", "silent", "failing"])
def unusable_server(request, monkeypatch):
    with serve(request.param) as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        yield


def small_config(folder: Path, tracking: TrackingConfig, name: str = "digits"):
    return replace(parse_config(compose([*TINY, "monolith=false"])), folder=str(folder), wandb=tracking, name=name)


def trained_run(folder: Path, tracking: TrackingConfig, name: str = "digits") -> RunFolder:
    """Return a run with one expert that has logged three steps."""
    run, config = RunFolder(folder), small_config(folder, tracking, name)
    folder.mkdir()
    run.save_config(config)
    expert = next(stage for stage in build_graph(config) if stage.name == "expert_0")
    run.attempt(expert, 1).mkdir(parents=True)
    rows = [json.dumps({"step": step, "loss": 1.0 / step}) + "\n" for step in (1, 2, 3)]
    write_text(run.attempt(expert, 1) / "metrics.jsonl", "".join(rows))
    Image.new("L", (8, 8)).save(run.attempt(expert, 1) / STEP_SAMPLES.format(2))
    write_text(run.attempt(expert, 1) / VALIDATION, json.dumps({"step": 2, "kid": 0.25, "kid_std": 0.1}) + "\n")
    return run


def test_unusable_server_is_one_warning(unusable_server, tmp_path):
    run, warnings = trained_run(tmp_path / "run", ONLINE), []
    with track_run(run, ONLINE, warnings.append):
        pass
    assert len(warnings) == 1 and "\n" not in warnings[0] and str(run.tracking) in warnings[0]


@pytest.mark.integration
def test_run_with_a_silent_server_finishes_with_one_warning(tmp_path, monkeypatch):
    output = io.StringIO()
    with serve("silent") as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        result = run_pipeline(small_config(tmp_path / "run", ONLINE), Console(file=output, width=1000))
    assert "ensemble" in result.finished and not result.failed and not result.stopped
    assert output.getvalue().count("Warning") == 1
    events = [event["event"] for event in RunFolder(tmp_path / "run").read_events()]
    assert events.count("warning") == 1 and events[-1] == "run_ended"


def test_offline_run_with_any_name_is_logged_once(tmp_path):
    offline, warnings = TrackingConfig(mode="offline", finish_s=300.0), []
    run = trained_run(tmp_path / "run", offline, name="a=1,b=2")
    for _ in range(2):
        with track_run(run, offline, warnings.append):
            pass
    (record,) = run.root.glob("wandb/offline-run-*expert_0*/*.wandb")
    assert b"loss" in record.read_bytes() and not warnings
    assert len([*run.root.glob("wandb/offline-run-*/files/media/images/validation*.png")]) == 1
    links = [path for path in run.root.rglob("*") if path.is_symlink()]
    assert all(path.resolve().is_relative_to(run.root.resolve()) for path in links)


def test_trackio_records_each_step_once(tmp_path):
    pytest.importorskip("trackio")
    offline, warnings = TrackingConfig(library="trackio", finish_s=300.0), []
    run = trained_run(tmp_path / "run", offline)
    for _ in range(2):
        with track_run(run, offline, warnings.append):
            pass
    with sqlite3.connect(run.root / "trackio" / "ddm.db") as database:
        rows = [json.loads(row) for (row,) in database.execute("select metrics from metrics order by step")]
    assert [row["loss"] for row in rows if "loss" in row] == [1, 1 / 2, 1 / 3] and not warnings
    (validated,) = [row for row in rows if "validation" in row]
    assert (validated["validation/step"], validated["validation/kid"]) == (2, 0.25)
    assert len([*(run.root / "trackio").rglob("*.png")]) == 1


def test_missing_library_is_named_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install trackio, or set wandb\.library=wandb"):
        require_account(TrackingConfig(library="trackio"))


def test_failed_block_leaves_no_tracker_and_no_warning(tmp_path):
    offline, warnings = TrackingConfig(mode="offline", finish_s=300.0), []
    with (
        pytest.raises(RuntimeError, match="lost"),
        track_run(trained_run(tmp_path / "run", offline), offline, warnings.append),
    ):
        raise RuntimeError("the lease is lost")
    assert not warnings


@given(st.text(min_size=1, max_size=300), st.text(min_size=1, max_size=300))
def test_names_are_safe_short_and_distinct(first, second):
    names = [safe_name(first), safe_name(second)]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+", name) and len(name) <= MAX_GROUP_LENGTH for name in names)
    assert (names[0] == names[1]) == (first == second)
