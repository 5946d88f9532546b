"""A run that is killed at any moment resumes, and its artifacts are byte-identical to an uninterrupted run."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ddm_core.artifacts import read_json, verify
from orchestrator.run.lease import process_start_time, read_holder
from orchestrator.run.run_folder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SMALL = (
    "experiment=digits",
    "data.limit=600",
    "expert.training.steps=240",
    "expert.training.checkpoint_every=20",
    "router.training.steps=120",
    "router.training.checkpoint_every=20",
    "scores.num_samples=64",
    "scores.spaces=[pixels]",
    "monolith=false",
    "wandb.mode=disabled",
    "compute.backoff_s=0",
)
ON_RAY = (*SMALL, "compute=ray_local")


def ddm(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "orchestrator", *arguments]


def run(*arguments: str) -> str:
    process = subprocess.run(ddm(*arguments), capture_output=True, text=True, timeout=400)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of every artifact, and of manifests only the fields that do not depend on time and place."""
    files = sorted(path for path in (folder / "artifacts").rglob("*") if path.is_file())
    files_by_name = {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name != "manifest.json"}
    for path in files:
        if path.name == "manifest.json":
            verify(path.parent)
            manifest = read_json(path)
            fields = {key: manifest[key] for key in ("stage", "fingerprint", "config", "inputs", "checksums", "flops")}
            files_by_name[str(path.relative_to(folder))] = repr(fields).encode()
    return files_by_name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return an uninterrupted run on Ray."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run("run", *ON_RAY, f"folder={folder}")
    return folder


def test_inline_and_ray_write_identical_artifacts(undisturbed, tmp_path):
    run("run", *SMALL, f"folder={tmp_path}")
    assert contents(tmp_path) == contents(undisturbed)


def test_second_run_submits_nothing(undisturbed):
    before = (undisturbed / "journal.jsonl").read_text()
    assert "nothing to do" in run("run", *ON_RAY, f"folder={undisturbed}")
    assert (undisturbed / "journal.jsonl").read_text() == before


@pytest.mark.integration
def test_controller_killed_five_times_is_bit_identical(undisturbed, tmp_path):
    moments = random.Random(0)
    command, kills = ddm("run", *ON_RAY, f"folder={tmp_path}"), 0
    while kills < 5:
        controller = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            controller.wait(timeout=moments.uniform(2.0, 7.0))
        except subprocess.TimeoutExpired:
            controller.send_signal(signal.SIGKILL)
            kills += 1
        controller.wait()
        assert kills == 5 or controller.returncode == -signal.SIGKILL, "the run ended before it was killed five times"
        command = ddm("resume", str(tmp_path))
    run("resume", str(tmp_path))
    assert contents(tmp_path) == contents(undisturbed)


@pytest.mark.integration
def test_killed_expert_worker_resumes_checkpoint(undisturbed, tmp_path):
    controller = subprocess.Popen(ddm("run", *ON_RAY, f"folder={tmp_path}"), stdout=subprocess.DEVNULL)
    worker = _wait_for_checkpoint(tmp_path, controller)
    os.kill(worker, signal.SIGKILL)
    assert controller.wait(timeout=300) == 0
    events = [event["event"] for event in RunFolder(tmp_path).read_events() if event.get("stage") == "expert_1"]
    assert events == ["submitted", "lost", "submitted", "finished"]
    assert contents(tmp_path) == contents(undisturbed)


@pytest.mark.integration
def test_permanently_failed_expert_is_omitted(undisturbed, tmp_path):
    command = ("run", *ON_RAY, f"folder={tmp_path}", "compute.retries=0")
    controller = subprocess.Popen(ddm(*command), stdout=subprocess.PIPE, text=True)
    os.kill(_wait_for_checkpoint(tmp_path, controller), signal.SIGKILL)
    output, _ = controller.communicate(timeout=300)
    assert controller.returncode == 0 and "assembled without it" in output
    assert "The ensemble runs without expert_1" in (tmp_path / "report.html").read_text()
    run("sample", str(tmp_path), "--out", str(tmp_path / "grid.png"))
    run("resume", str(tmp_path))
    assert "runs without" not in (tmp_path / "report.html").read_text()
    expected = contents(undisturbed)
    assert {name: data for name, data in contents(tmp_path).items() if name in expected} == expected


def _wait_for_checkpoint(folder: Path, controller: subprocess.Popen) -> int:
    """Wait until expert 1's worker has saved a checkpoint, and return its pid."""
    while controller.poll() is None:
        for scratch in (folder / "work").glob("expert_1-*"):
            worker = scratch / "attempt_1" / "worker.json"
            if any((scratch / "state" / "checkpoints").glob("*")) and process_start_time(read_json(worker)["pid"]):
                return int(read_json(worker)["pid"])
        time.sleep(0.01)
    raise AssertionError(f"the run ended with {controller.returncode} before expert_1 wrote a checkpoint")


@pytest.mark.integration
def test_ctrl_c_leaves_a_resumable_run(undisturbed, tmp_path):
    controller = subprocess.Popen(ddm("run", *ON_RAY, f"folder={tmp_path}"), stdout=subprocess.PIPE, text=True)
    _wait_for_checkpoint(tmp_path, controller)
    controller.send_signal(signal.SIGINT)
    output, _ = controller.communicate(timeout=120)
    assert controller.returncode == 130 and f"ddm resume {tmp_path}" in output
    assert read_holder(RunFolder(tmp_path)) is None and not (tmp_path / "stop").exists()
    run("resume", str(tmp_path))
    assert contents(tmp_path) == contents(undisturbed)


@pytest.mark.integration
def test_changed_router_runs_only_dependent_stages(undisturbed, tmp_path):
    folder = shutil.copytree(undisturbed, tmp_path / "copy")
    run("run", *ON_RAY, f"folder={folder}", "router.training.lr=0.002", "--replace")
    events = RunFolder(folder).read_events()
    last = max(number for number, event in enumerate(events) if event["event"] == "run_started")
    submitted = {event["stage"] for event in events[last:] if event["event"] == "submitted"}
    assert submitted == {"router", "ensemble", "score_sticky"}
