"""What a person sees while a run is on its way."""

import io
import time

import pytest
from rich.console import Console

from ddm_core.artifacts import Workspace
from orchestrator.reporting.progress import RunDisplay, clock, describe, figure, progress_of
from tests.orchestrator.fakes import diamond, run_folder


@pytest.mark.parametrize(("seconds", "words"), [(0, "0:00"), (59.6, "1:00"), (75, "1:15"), (3723, "1:02:03")])
def test_clock(seconds, words):
    assert clock(seconds) == words


@pytest.mark.parametrize(("value", "words"), [(0.52471, "0.5247"), (12790.4, "12,790"), (999.96, "1000"), (0, "0")])
def test_figure(value, words):
    assert figure(value) == words


def test_progress_in_words(tmp_path):
    workspace = Workspace.at(tmp_path)
    assert describe(progress_of(workspace.attempt)) == "waiting for a worker"
    workspace.report_progress(1, 4, {"loss": 0.25, "images_per_s": 4321.0}, unit="steps")
    assert describe(progress_of(workspace.attempt)) == " 25%  images/s 4,321  loss 0.25"
    time.sleep(0.6)
    workspace.report_progress(3, 4, unit="steps")
    assert describe(progress_of(workspace.attempt)) == " 75%  0:00 left"


def test_progress_without_a_known_end(tmp_path):
    workspace = Workspace.at(tmp_path)
    workspace.report_progress(12345, None, unit="images")
    assert describe(progress_of(workspace.attempt)) == "12,345 images"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_running_stage_has_its_line_and_errors_are_printed_as_they_are(tmp_path, monkeypatch, terminal):
    monkeypatch.setattr("orchestrator.reporting.progress.PLAIN_EVERY_S", 0.05)
    run, stage = run_folder(tmp_path), diamond()[1]
    attempt = run.attempt(stage, 1)
    Workspace(run.scratch(stage), attempt).report_progress(2, 4, {"loss": 0.5}, unit="steps")
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    with RunDisplay(run, console) as display:
        display.tick([stage])
        time.sleep(0.6)
        display.event("failed", stage, "pip install 'decentralized-diffusion[features]' for [/tmp/x]")
    shown = console.file.getvalue()
    assert "expert_0" in shown and "loss 0.5" in shown
    assert "'decentralized-diffusion[features]' for [/tmp/x]" in shown
