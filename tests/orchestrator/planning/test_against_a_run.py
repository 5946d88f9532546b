"""Plan and costs against a real run, whose controller was killed in the middle of an expert and started again."""

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
from orchestrator.planning.plan import plan
from orchestrator.reporting.costs import cost_line, cost_rows, total
from orchestrator.reporting.page import write_report
from orchestrator.run.attempts import attempts_of
from orchestrator.run.run_folder import RunFolder

pytestmark = pytest.mark.slow

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
    return plan(config, RunFolder(Path(config.folder)))


@pytest.fixture(scope="module")
def run(config, estimated):
    command = [sys.executable, "-m", "orchestrator", "run", *SMALL, f"folder={config.folder}"]
    controller = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _wait_for_a_checkpoint(Path(config.folder))
    controller.send_signal(signal.SIGKILL)
    controller.wait()
    run_pipeline(config, Console(quiet=True))
    return RunFolder(Path(config.folder))


def _wait_for_a_checkpoint(folder: Path) -> None:
    deadline = time.monotonic() + 120
    while not any(folder.glob("work/expert_1-*/state/checkpoints/step-*")):
        assert time.monotonic() < deadline, "expert_1 wrote no checkpoint within two minutes"
        time.sleep(0.01)


def test_every_stage_takes_the_flops_that_were_planned(estimated, run):
    planned = {row.name: row.flops for row in estimated.stages}
    for stage in build_graph(run.load_config()):
        assert planned[stage.name] == pytest.approx(read_manifest(run.artifact(stage)).flops, rel=0.05), stage.name


def test_the_estimate_is_of_the_right_size(estimated, run):
    actual = sum(read_manifest(run.artifact(stage)).seconds for stage in build_graph(run.load_config()))
    expected = sum(row.estimate.seconds for row in estimated.stages)
    assert 0.1 < expected / actual < 10  # the machine may be much busier with the one than with the other


def test_what_was_planned_to_be_moved_or_kept_has_that_size(estimated, run):
    assert estimated.seconds > estimated.critical_path_s > 0 and not estimated.unknown
    assert estimated.comparison.monolith.workers == 1


def test_the_costs_add_up_to_the_timeline_and_nothing_is_counted_twice(run):
    rows, attempts = cost_rows(run), attempts_of(run, build_graph(run.load_config()))
    everything = total(rows)
    assert everything.seconds == pytest.approx(sum(attempt.end - attempt.start for attempt in attempts))
    assert everything.attempts == len(attempts) == 14
    assert everything.cpu_seconds == everything.seconds and everything.price == everything.gpu_seconds == 0
    assert sorted(row.attempts for row in rows) == [1] * 12 + [2]
    in_order = sorted(attempts, key=lambda attempt: attempt.start)
    for before, after in zip(in_order, in_order[1:], strict=False):
        assert before.end <= after.start + 0.1, "inline runs one after the other"


def test_the_killed_attempt_lost_only_what_was_not_saved(run):
    expert = next(row for row in cost_rows(run) if row.stage == "expert_1")
    attempts = attempts_of(run, build_graph(run.load_config()))
    killed, second = (attempt for attempt in attempts if attempt.stage == "expert_1")
    assert (killed.state, second.state) == ("lost", "finished")
    assert second.steps.first >= 20 and second.steps.first % 20 == 0 and second.steps.last == 240
    assert 0 <= expert.lost_s <= killed.seconds and 0 <= expert.lost_steps < 240
    assert total(cost_rows(run)).lost_s == expert.lost_s
    assert "14 attempts" in cost_line(run)


def test_the_report_shows_the_costs(run):
    page = write_report(run).read_text()
    assert "What it cost" in page and "<td>everything</td><td>14</td>" in page


def test_wandb_knows_the_costs(run):
    (told,) = run.root.glob("wandb/offline-run-*expert_1*/*.wandb")
    for name in (b"cost/lost_s", b"cost/attempts", b"cost/gpu_seconds", b"cost/cpu_seconds", b"cost/price"):
        assert name in told.read_bytes()


def test_a_finished_run_is_not_planned_again(run, config):
    found = plan(config, run)
    assert all(row.state == "finished" for row in found.stages) and found.seconds == 0.0


def test_a_calibration_that_fails_says_why(config, tmp_path):
    lost = replace(config, data=DataConfig(source="image_folder", path=str(tmp_path / "none")))
    with pytest.raises(CalibrationFailed, match="is not a folder"):
        calibrate(lost)
