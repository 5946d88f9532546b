"""Plan and costs against a real run whose controller was killed during an expert's training and started again."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from data_partition.config import DataConfig
from ddm_core.artifacts import read_manifest
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import parse_config
from orchestrator.controller import run_pipeline
from orchestrator.pipeline.graph import build_graph
from orchestrator.planning.calibration import CalibrationFailed, calibrate
from orchestrator.planning.plan import plan_run
from orchestrator.reporting.costs import format_run_costs, load_costs, sum_costs
from orchestrator.run.attempts import load_attempts
from orchestrator.run.run_folder import RunFolder
from orchestrator.ui.report import write_report

pytestmark = pytest.mark.integration

SMALL = (
    "experiment=digits",
    "compute=inline",
    "data.limit=600",
    "expert.training.steps=240",
    "expert.training.checkpoint_every=20",
    "router.training.steps=60",
    "+experts.0.network.width=64",
    "scores.num_samples=64",
    "ensemble.steps=4",
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return parse_config(compose([*SMALL, f"folder={tmp_path_factory.mktemp('run')}"]))


@pytest.fixture(scope="module")
def estimated(config):
    calibrate(config)
    return plan_run(config, RunFolder(Path(config.folder)))


@pytest.fixture(scope="module")
def run(config, estimated):
    command = [sys.executable, "-m", "orchestrator", "run", *SMALL, f"folder={config.folder}"]
    controller = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _wait_for_checkpoint(Path(config.folder))
    controller.send_signal(signal.SIGKILL)
    controller.wait()
    run_pipeline(config, Console(quiet=True))
    return RunFolder(Path(config.folder))


def _wait_for_checkpoint(folder: Path) -> None:
    deadline = time.monotonic() + 120
    while not any(folder.glob("work/expert_1-*/state/checkpoints/step-*")):
        assert time.monotonic() < deadline, "expert_1 wrote no checkpoint within two minutes"
        time.sleep(0.01)


def test_every_stage_takes_its_planned_flops(estimated, run):
    planned = {row.name: row.flops for row in estimated.stages}
    for stage in build_graph(run.load_config()):
        # The number of held-out images, which the reference reads, is planned by its expectation.
        tolerance = 0.15 if stage.kind == "reference" else 0.05
        actual = read_manifest(run.artifact(stage)).flops
        assert planned[stage.name] == pytest.approx(actual, rel=tolerance), stage.name


def test_estimated_time_has_the_right_magnitude(estimated, run):
    actual = sum(read_manifest(run.artifact(stage)).seconds for stage in build_graph(run.load_config()))
    expected = sum(row.estimate.seconds for row in estimated.stages)
    assert 0.1 < expected / actual < 10  # the load of the machine may differ between both


def test_plan_has_all_durations_and_one_monolith_worker(estimated, run):
    assert estimated.seconds > estimated.critical_path_s > 0 and not estimated.unknown
    assert estimated.comparison.monolith.workers == 1


def test_costs_sum_to_the_timeline_without_double_counts(run):
    rows, attempts = load_costs(run), load_attempts(run, build_graph(run.load_config()))
    total_cost = sum_costs(rows)
    assert total_cost.seconds == pytest.approx(sum(attempt.end - attempt.start for attempt in attempts))
    assert total_cost.attempts == len(attempts) == 15
    assert total_cost.cpu_seconds == total_cost.seconds and total_cost.price == total_cost.gpu_seconds == 0
    assert sorted(row.attempts for row in rows) == [1] * 13 + [2]
    ordered = sorted(attempts, key=lambda attempt: attempt.start)
    for before, after in zip(ordered, ordered[1:], strict=False):
        assert before.end <= after.start + 0.1, "inline runs stages sequentially"


def test_killed_attempt_loses_only_unsaved_steps(run):
    expert = next(row for row in load_costs(run) if row.stage == "expert_1")
    attempts = load_attempts(run, build_graph(run.load_config()))
    killed, second = (attempt for attempt in attempts if attempt.stage == "expert_1")
    assert (killed.state, second.state) == ("lost", "finished")
    assert second.steps.first >= 20 and second.steps.first % 20 == 0 and second.steps.last == 240
    assert 0 <= expert.lost_s <= killed.seconds and 0 <= expert.lost_steps < 240
    assert sum_costs(load_costs(run)).lost_s == expert.lost_s
    assert "15 attempts" in format_run_costs(run)


def test_report_shows_the_costs(run):
    page = write_report(run).read_text()
    assert "Costs" in page and '<th scope="row">whole run</th><td>15</td>' in page


def test_wandb_contains_the_costs(run):
    (record,) = run.root.glob("wandb/offline-run-*expert_1*/*.wandb")
    for name in (b"cost/lost_s", b"cost/attempts", b"cost/gpu_seconds", b"cost/cpu_seconds", b"cost/price"):
        assert name in record.read_bytes()


def test_finished_run_has_an_empty_plan(run, config):
    plan = plan_run(config, run)
    assert all(row.state == "finished" for row in plan.stages) and plan.seconds == 0.0


def test_failed_calibration_reports_its_cause(config, tmp_path):
    invalid = replace(config, data=DataConfig(source="image_folder", path=str(tmp_path / "none")))
    with pytest.raises(CalibrationFailed, match="is not a folder"):
        calibrate(invalid)
