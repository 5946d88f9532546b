"""The costs that are still to come, on timelines whose answer is known."""

from pathlib import Path

import pytest

from orchestrator.config.compute import ComputeConfig, IslandConfig, ResourcesConfig
from orchestrator.pipeline.stage import Stage
from orchestrator.reporting.status import StatusRow
from orchestrator.run.attempts import Attempt, Progress
from orchestrator.ui.facts.projection import project_costs

ISLAND = IslandConfig(address="http://127.0.1.1:8265", token_file="t", storage="/s", cpus=8, price_per_hour=8.0)
COMPUTE = ComputeConfig(backend="islands", islands={"a": ISLAND})


def attempt(stage: str, seconds: float, state: str) -> Attempt:
    resources = ResourcesConfig(cpus=2)
    facts = {"attempt": 1, "folder": Path(stage), "island": "a", "place": "", "resources": resources, "start": 0.0}
    process = {"host": "h", "pid": 1, "started": 0.0, "boot": ""}
    return Attempt(stage=stage, end=seconds, state=state, error="", cpu_s=0.0, progress=None, process=process, **facts)


def row(name: str, state: str, left_s: float | None = None) -> StatusRow:
    progress = Progress(left_s=left_s) if left_s is not None else None
    return StatusRow(name=name, is_expert=False, island="a", state=state, attempts=1, progress=progress)


def test_waiting_stages_cost_as_much_as_the_others_of_their_kind():
    graph = [Stage(name=f"expert_{k}", kind="expert", config={}) for k in range(4)]
    graph.append(Stage(name="router", kind="router", config={}))
    rows = [row("expert_0", "finished"), row("expert_1", "running", 300.0), row("expert_2", "waiting")]
    rows += [row("expert_3", "failed"), row("router", "running")]
    attempts = [attempt("expert_0", 600.0, "finished"), attempt("expert_1", 500.0, "running")]
    projected = project_costs(graph, rows, attempts, COMPUTE)
    expected_s = 300 + 2 * (600 + 800) / 2
    assert projected.left.seconds == pytest.approx(expected_s)
    assert projected.left.cpu_seconds == pytest.approx(2 * expected_s)
    assert projected.left.price == pytest.approx(8.0 * 2 / 8 * expected_s / 3600)
    assert projected.unknown == 1  # the router has not said how long it takes


def test_finished_run_costs_nothing_more():
    graph = [Stage(name="expert_0", kind="expert", config={})]
    projected = project_costs(graph, [row("expert_0", "finished")], [attempt("expert_0", 60.0, "finished")], COMPUTE)
    assert (projected.left.seconds, projected.left.price, projected.unknown) == (0, 0, 0)
