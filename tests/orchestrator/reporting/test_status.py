"""Status, logs and report of a run with several experts: what they show, and what they import."""

import io
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from benchmarks.large_runs import build_run
from ddm_core.artifacts import to_jsonable
from orchestrator.pipeline.graph import build_graph
from orchestrator.reporting import status
from orchestrator.reporting.status import (
    describe_stage,
    find_log_file,
    has_ended,
    load_facts,
    load_status,
    merge_experts,
    print_file,
    status_table,
    watch_status,
)
from orchestrator.run.attempts import load_all_attempts
from orchestrator.run.lease import hold_lease
from orchestrator.ui.report import write_report

EXPERTS, ROWS = 40, 60


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return build_run(tmp_path_factory.mktemp("many") / "run", EXPERTS, ROWS)


def printed(renderable, width=80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()


def test_many_experts_share_rows_that_add_up(run):
    rows = load_status(run, build_graph(run.load_config()), load_all_attempts(run))
    merged = merge_experts(rows)
    counts = Counter(row.state for row in rows if row.is_expert)
    assert {row.state: int(row.name.split()[0]) for row in merged if row.is_expert} == counts and len(counts) == 2
    assert sum(row.attempts for row in merged) == sum(row.attempts for row in rows)
    assert [row for row in merged if not row.is_expert] == [row for row in rows if not row.is_expert]


def test_status_of_many_experts_lists_all_on_request(run):
    assert "expert_17" not in printed(status_table(run)) and "36 experts" in printed(status_table(run))
    assert all(f"expert_{k} " in printed(status_table(run, all_experts=True), 120) for k in range(EXPERTS))


@pytest.mark.parametrize("width", [40, 80])
def test_status_keeps_within_the_terminal(run, width):
    assert max(map(len, printed(status_table(run, all_experts=True), width).splitlines())) <= width


def test_status_as_json_is_that_of_the_table(run):
    printed = to_jsonable(load_facts(run))
    rows = load_status(run, build_graph(run.load_config()), load_all_attempts(run))
    assert [(stage["name"], stage["state"]) for stage in printed["stages"]] == [(row.name, row.state) for row in rows]
    assert printed["controller"] is None


def test_watch_prints_at_new_states_and_ends_with_the_controller(run, monkeypatch):
    holders = iter([SimpleNamespace(is_alive=True)] * 4 + [None] * 2)
    monkeypatch.setattr(status, "read_holder", lambda _run: next(holders))
    monkeypatch.setattr(status.time, "sleep", lambda _seconds: None)
    console = Console(file=io.StringIO(), width=80)
    watch_status(run, console)
    assert console.file.getvalue().count("36 experts") == 1 and next(holders, "none left") == "none left"


def test_logs_show_settings_losses_and_time_left(run):
    experts = (stage for stage in build_graph(run.load_config()) if stage.kind == "expert")
    stage = next(stage for stage in experts if not (run.attempts(stage)[-1] / "outcome.json").exists())
    text = describe_stage(run, stage.name, run.attempts(stage)[-1])
    assert f"steps: {10 * ROWS}" in text and f"step {10 * ROWS}  " in text and "loss" in text and "1:00 left" in text


def test_report_of_many_experts_is_short(run):
    text = write_report(run).read_text()
    assert "median of 36 experts" in text and "36 experts" in text and len(text) < 1_000_000
    assert "At the end the loss is highest for expert_" in text


def test_damaged_metrics_block_neither_status_nor_report(run):
    stage = next(stage for stage in build_graph(run.load_config()) if stage.name == "expert_5")
    path = run.artifact(stage) / "metrics.jsonl"
    intact = path.read_bytes()
    path.write_bytes(intact[:500] + b"\xff\x00" + intact[502:])
    (run.attempts(stage)[-1] / "progress.json").write_bytes(b"\xff{")
    try:
        assert "The metrics of expert_5 are damaged" in write_report(run).read_text()
        assert "36 experts" in printed(status_table(run))
    finally:
        path.write_bytes(intact)


@pytest.mark.parametrize("command", ["status", "logs", "report"])
def test_reading_command_imports_no_numeric_library(run, command):
    heavy = ["torch", "ray", "sklearn", "scipy", "diffusers", "webdataset"]
    heavy += ["matplotlib", "numpy"] if command != "report" else []
    words = [command, str(run.root), *(["expert_1"] if command == "logs" else [])]
    code = (
        "import sys; from orchestrator.cli.app import app\n"
        f"app({words!r}, standalone_mode=False)\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    root = Path(__file__).parents[3]
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root).stdout
    assert output.endswith("[]\n")


def test_following_ends_with_the_stage_and_with_the_run(run, tmp_path):
    attempt = find_log_file(run, "expert_1", 0).parent
    assert has_ended(run, attempt) and has_ended(run, None)
    with hold_lease(run):
        assert has_ended(run, attempt) and not has_ended(run, None)


def test_what_is_written_before_the_end_is_printed(tmp_path, capsys):
    log, looks = tmp_path / "log.txt", []

    def has_ended() -> bool:
        looks.append(log.write_text(f"{log.read_text()}line {len(looks)}\n"))
        return len(looks) == 3

    log.write_text("")
    print_file(log, has_ended)
    assert capsys.readouterr().out == "line 0\nline 1\nline 2\n"
