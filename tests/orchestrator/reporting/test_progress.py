"""Progress display of a run."""

import io
import time

import pytest
from rich.console import Console

from ddm_core.artifacts import Workspace
from orchestrator.pipeline.stage import FIRST_SAMPLES
from orchestrator.reporting import progress
from orchestrator.reporting.progress import RunDisplay, format_clock, format_number, format_progress
from orchestrator.run.attempts import load_progress
from tests.orchestrator.fakes import diamond, run_folder


@pytest.mark.parametrize(("seconds", "words"), [(0, "0:00"), (59.6, "1:00"), (75, "1:15"), (3723, "1:02:03")])
def test_format_clock_rounds_to_seconds(seconds, words):
    assert format_clock(seconds) == words


@pytest.mark.parametrize(("value", "words"), [(0.52471, "0.5247"), (12790.4, "12,790"), (999.96, "1000"), (0, "0")])
def test_format_number_has_four_digits(value, words):
    assert format_number(value) == words


def test_format_progress_has_share_figures_and_time_left(tmp_path):
    workspace = Workspace.at(tmp_path)
    assert format_progress(load_progress(workspace.attempt)) == "waiting for a worker"
    workspace.report_progress(1, 4, {"loss": 0.25, "images_per_s": 4321.0}, unit="steps")
    assert format_progress(load_progress(workspace.attempt)) == " 25%  images/s 4,321  loss 0.25"
    time.sleep(0.6)
    workspace.report_progress(3, 4, unit="steps")
    assert format_progress(load_progress(workspace.attempt)) == " 75%  0:00 left"


def test_progress_without_a_total_shows_the_count(tmp_path):
    workspace = Workspace.at(tmp_path)
    workspace.report_progress(12345, None, unit="images")
    assert format_progress(load_progress(workspace.attempt)) == "12,345 images"


@pytest.mark.parametrize("terminal", [True, False])
def test_display_shows_running_stages_and_verbatim_errors(tmp_path, monkeypatch, terminal):
    monkeypatch.setattr("orchestrator.reporting.progress.LOOK_EVERY_S", 0.05)
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


def test_log_has_a_line_a_minute_and_none_of_a_complete_stage(tmp_path, monkeypatch):
    monkeypatch.setattr("orchestrator.reporting.progress.LOOK_EVERY_S", 0.02)
    run, (_, first, second, *_) = run_folder(tmp_path), diamond()
    Workspace(run.scratch(first), run.attempt(first, 1)).report_progress(4, 4, unit="steps")
    changing = Workspace(run.scratch(second), run.attempt(second, 1))
    console = Console(file=io.StringIO(), width=120)
    with RunDisplay(run, console) as display:
        display.tick([first, second])
        for done in range(3):
            changing.report_progress(done, 4, unit="steps")
            time.sleep(0.6)
    lines = console.file.getvalue().splitlines()
    assert [line.split()[:2] for line in lines] == [["expert_1", "0%"]]


@pytest.mark.parametrize("is_running", [True, False])
def test_samples_of_the_first_expert_are_named_once(tmp_path, monkeypatch, is_running):
    monkeypatch.setattr(progress, "LOOK_EVERY_S", 1e-3)
    run, (_, first, second, *_) = run_folder(tmp_path), diamond()
    console = Console(file=io.StringIO(), width=120)
    with RunDisplay(run, console) as display:
        for stage in (second, first):
            display.tick([stage] if is_running else [])
            run.attempt(stage, 1).mkdir(parents=True)
            (run.attempt(stage, 1) / FIRST_SAMPLES).touch()
            time.sleep(2e-3)
            display.tick([stage] if is_running else [])
            assert ("samples" in console.file.getvalue()) == (is_running or stage is first)
            display.event("finished", stage, "in 1 s")
    named = [line for line in console.file.getvalue().splitlines() if "samples" in line]
    assert len(named) == 1 and named[0].endswith(str(run.attempt(second, 1) / FIRST_SAMPLES))


@pytest.mark.parametrize("damage", ["{", "[]", '{"done": "x", "total": 1}', "\x00"])
def test_damaged_progress_is_reported_as_such(tmp_path, damage):
    (tmp_path / "progress.json").write_text(damage)
    assert "damaged" in format_progress(load_progress(tmp_path))
