"""The budget of a run: it warns, stops the run with its work saved, and a larger one gives the same bytes."""

import io
from dataclasses import replace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from orchestrator.cli.app import app
from orchestrator.config.compute import ComputeConfig
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import parse_config
from orchestrator.controller import run_pipeline
from orchestrator.errors import BudgetReached, ConfigError
from orchestrator.pipeline.graph import build_graph
from orchestrator.reporting import budget as module
from orchestrator.reporting.budget import Budget
from orchestrator.reporting.costs import CostRow
from orchestrator.run.run_folder import RunFolder
from tests.laws.conftest import TINY
from tests.laws.conftest import tiny_run as finished_run


def test_it_warns_once_and_stops_once(tmp_path, monkeypatch):
    hours = iter([0.5, 0.8, 0.9, 1.1])
    monkeypatch.setattr(module, "load_costs", lambda _run: [CostRow(stage="x", seconds=3600 * next(hours))])
    monkeypatch.setattr(module, "IDLE_FACTOR", 0)
    run, warnings = RunFolder(tmp_path), []
    budget = Budget(run, ComputeConfig(budget_hours=1.0), warnings.append)
    stops = []
    for _ in range(6):
        budget.check()
        stops.append(run.stop.exists())
    assert stops == [False, False, False, True, True, True]
    assert warnings == ["0.8 of compute.budget_hours=1 is spent; at 100 % the run stops"]
    assert [event["event"] for event in run.read_events()] == ["budget_nearly_reached", "budget_reached"]


def test_without_a_budget_nothing_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load_costs", None)
    Budget(RunFolder(tmp_path), ComputeConfig(), pytest.fail).check()


def test_spent_budget_stops_a_run_that_a_larger_one_continues(tmp_path, tiny_run):
    folder = tmp_path / "run"
    config = parse_config(compose([*TINY, f"folder={folder}", "wandb.mode=disabled", "compute.budget_hours=1e-9"]))
    for attempts in (1, 1):  # the second ends before a stage starts
        with pytest.raises(BudgetReached, match=r"is spent: this run has cost .*; continue with `ddm resume .*-hours"):
            run_pipeline(config, Console(file=io.StringIO()))
        assert len(RunFolder(folder).attempted_stages()) == attempts and not RunFolder(folder).stop.exists()
    assert "budget_reached" in [event["event"] for event in RunFolder(folder).read_events()]
    result = CliRunner().invoke(app, ["resume", str(folder), "--budget-hours", "-1"])
    assert isinstance(result.exception, ConfigError) and "budget_hours" in str(result.exception)
    assert CliRunner().invoke(app, ["resume", str(folder), "--budget-hours", "9"]).exit_code == 0
    ours, theirs = RunFolder(folder), RunFolder(tiny_run)
    for stage in build_graph(config):
        assert ours.is_finished(stage), stage.name
    expert = next(stage for stage in build_graph(config) if stage.name == "expert_0")
    paths = [run.artifact(expert) / "diffusion_pytorch_model.safetensors" for run in (ours, theirs)]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_budget_of_money_needs_a_price():
    with pytest.raises(ConfigError, match="budget_cost counts the prices of islands, and none has one"):
        parse_config(compose(["experiment=digits", "compute.budget_cost=5"]))
    island = {"address": "http://127.0.0.1:1", "token_file": "x", "storage": "/x", "price_per_hour": 2}
    config = ComputeConfig(backend="islands", islands={"a": island}, budget_cost=5.0)
    assert replace(config, budget_cost=None).budget_cost is None


tiny_run = finished_run
