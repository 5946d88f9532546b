"""Stages as Slurm jobs: nothing runs twice, unknown is not lost, and every end has its reason.

Fakes of Slurm's programs test the responses; submitit's local executor tests real processes and real signals.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from ddm_core.artifacts import read_json, write_json
from orchestrator.backends import slurm_queue
from orchestrator.backends.slurm import SlurmBackend
from orchestrator.backends.slurm_worker import claim
from orchestrator.config.compute import ComputeConfig, ResourcesConfig, StagesConfig
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import parse_config
from orchestrator.controller import run_pipeline
from orchestrator.errors import ConfigError
from orchestrator.run.backend import Job, attempt_folder
from orchestrator.run.lease import read_holder
from orchestrator.run.run_folder import RunFolder
from tests.orchestrator.fakes import run_folder

LOCAL = {"cluster": "local"}

PROGRAMS = {
    "srun": "exit 0",
    "squeue": "test ! -e down || exit 1; cat queue",
    "scancel": 'echo "$@" >> cancelled; test ! -e down || exit 1; : > queue',
    "sbatch": """cp "$1" script
        test ! -e refuse || { echo "sbatch: error: Invalid account" >&2; exit 1; }
        echo "PENDING|$(sed -n 's/^#SBATCH --job-name=//p' script)" >> queue
        test ! -e stutter || { echo "sbatch: error: Socket timed out" >&2; exit 1; }
        echo "Submitted batch job 7" """,
}


class Slurm:
    """Fakes of Slurm's programs, and files with their responses."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name, body in PROGRAMS.items():
            (folder / name).write_text(f"#!/bin/sh\ncd {folder}\n{body}\n")
            (folder / name).chmod(0o755)
        self.lists()

    def lists(self, *lines: str) -> None:
        (self.folder / "queue").write_text("".join(f"{line}\n" for line in lines))

    def is_down(self, down: bool = True) -> None:
        (self.folder / "down").touch() if down else (self.folder / "down").unlink()


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    fake = Slurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{fake.folder}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm_queue, "POLL_INTERVAL_S", 0.0)
    return fake


def backend(folder, slurm=None, **compute) -> SlurmBackend:
    slurm_backend = SlurmBackend(ComputeConfig(backend="slurm", slurm=slurm or {}, **compute), run_folder(folder))
    slurm_backend._queue.pause_s = 0.0
    return slurm_backend


def job(folder, attempt: int = 1, stage: str = "dataset", **resources) -> Job:
    dataset_job = Job(
        stage=stage,
        kind="dataset",
        config={"source": "digits", "image_size": 8, "limit": 300},
        inputs={},
        input_fingerprints={},
        artifact=str(folder / "artifacts" / f"{stage}-0"),
        scratch=str(folder / "work" / f"{stage}-0" / "state"),
        attempt=attempt,
        stop_files=(),
        resources=ResourcesConfig(**resources),
        island="slurm",
    )
    write_json(attempt_folder(dataset_job) / "job.json", dataset_job)
    return dataset_job


def age(folder: Path) -> None:
    """Set the age of all files of an attempt to one hour."""
    for path in (*folder.iterdir(), folder):
        os.utime(path, (time.time() - 3600,) * 2)


@pytest.mark.parametrize(
    ("slurm", "message"),
    [
        ({"cluster": "moon"}, "slurm or local"),
        (LOCAL | {"slurm_partitoin": "gpu"}, "partitoin"),
        (LOCAL | {"timeout_min": "soon"}, "timeout_min"),
        (LOCAL | {"slurm_job_name": "x", "nodes": 2}, "must not set nodes, slurm_job_name"),
    ],
)
def test_backend_invalid_parameter_is_an_error(tmp_path, slurm, message):
    with pytest.raises(ConfigError, match=message):
        backend(tmp_path, slurm)


def test_backend_fractional_gpus_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="compute.stages.expert.gpus must be a whole number with Slurm; got 0.5"):
        backend(tmp_path, LOCAL, stages=StagesConfig(expert=ResourcesConfig(gpus=0.5)))


def test_backend_without_slurm_is_one_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="srun"):
        backend(tmp_path)


def test_local_place_waits_for_free_cpus(tmp_path):
    slurm_backend = backend(tmp_path, LOCAL, cpus=2)
    first, second, third = (job(tmp_path, stage=name, cpus=cpus) for name, cpus in zip("abc", (1, 1, 4), strict=True))
    assert slurm_backend.place(third) == "slurm"  # larger than the machine, but no other job runs
    for running in (first, second):
        assert slurm_backend.place(running) == "slurm"
        claim(attempt_folder(running))
        assert slurm_backend.attach(running)
    assert slurm_backend.place(first) is None


def test_batch_script_contains_stage_resources(tmp_path, slurm):
    parameters = {"slurm_partition": "gpu", "timeout_min": 90}
    backend(tmp_path, parameters, grace_s=20.0).submit(job(tmp_path, cpus=3, gpus=2, memory_gb=8))
    script = (slurm.folder / "script").read_text()
    for line in (
        "partition=gpu",
        "time=90",
        "cpus-per-task=3",
        "gpus-per-node=2",
        "mem=8GB",
        "no-requeue",
        "signal=USR2@30",
    ):
        assert f"#SBATCH --{line}\n" in script
    command = script.strip().splitlines()[-1]
    assert "--cpus-per-task=3" in command
    assert command.endswith(
        f"{sys.executable} -P -m orchestrator.backends.slurm_worker {attempt_folder(job(tmp_path))}"
    )


def test_batch_script_default_time_is_one_day(tmp_path, slurm):
    backend(tmp_path).submit(job(tmp_path))
    assert "#SBATCH --time=1440\n" in (slurm.folder / "script").read_text()


def test_submit_writes_no_pickle(tmp_path, slurm):
    backend(tmp_path).submit(job(tmp_path))
    assert not [path for path in tmp_path.rglob("*") if "pickle" in path.name or path.suffix == ".pkl"]


def test_poll_without_slurm_response_loses_nothing(tmp_path, slurm):
    slurm_backend, waiting = backend(tmp_path), job(tmp_path)
    slurm_backend.submit(waiting)
    slurm.lists()
    slurm.is_down()
    age(attempt_folder(waiting))
    assert slurm_backend.poll(0.0) == [] and backend(tmp_path).attach(waiting)
    slurm.is_down(False)
    assert [outcome.state for outcome in slurm_backend.poll(0.0)] == ["lost"]


def test_poll_ignores_list_older_than_submission(tmp_path, slurm, monkeypatch):
    monkeypatch.setattr(slurm_queue, "POLL_INTERVAL_S", 3600.0)
    slurm_backend = backend(tmp_path)
    for stage in ("dataset", "codec"):
        slurm_backend.submit(job(tmp_path, stage=stage))
        assert slurm_backend.poll(0.0) == []


def test_poll_reads_outcome_without_slurm(tmp_path, slurm):
    slurm_backend, done = backend(tmp_path), job(tmp_path)
    slurm_backend.submit(done)
    slurm.is_down()
    write_json(attempt_folder(done) / "outcome.json", {"stage": "dataset", "attempt": 1, "state": "finished"})
    assert [outcome.state for outcome in slurm_backend.poll(0.0)] == ["finished"]


@pytest.mark.parametrize(
    ("slurm_state", "state"),
    [("TIMEOUT", "lost"), ("NODE_FAIL", "lost"), ("PREEMPTED", "preempted"), ("COMPLETING", None), ("REQUEUED", None)],
)
def test_poll_maps_slurm_states(tmp_path, slurm, slurm_state, state):
    slurm_backend, running = backend(tmp_path), job(tmp_path)
    slurm_backend.submit(running)
    claim(attempt_folder(running))
    slurm.lists((slurm.folder / "queue").read_text().strip().replace("PENDING", slurm_state))
    assert slurm_backend.poll(0.0) == []  # its folder has just changed
    age(attempt_folder(running))
    ended = slurm_backend.poll(0.0)
    assert [outcome.state for outcome in ended] == ([state] if state else [])
    assert not ended or slurm_state in ended[0].error


def test_submit_with_lost_response_keeps_job(tmp_path, slurm):
    (slurm.folder / "stutter").touch()
    slurm_backend = backend(tmp_path)
    slurm_backend.submit(job(tmp_path))
    assert slurm_backend.poll(0.0) == [] and slurm_backend.attach(job(tmp_path))


def test_submit_rejected_job_fails_and_never_runs(tmp_path, slurm):
    (slurm.folder / "refuse").touch()
    slurm_backend, refused = backend(tmp_path), job(tmp_path)
    slurm_backend.submit(refused)
    (outcome,) = slurm_backend.poll(0.0)
    assert (outcome.state, outcome.transient) == ("failed", True) and "Invalid account" in outcome.error
    assert not claim(attempt_folder(refused))


@pytest.mark.parametrize("responds", [True, False])
def test_kill_queued_job_prevents_its_start(tmp_path, slurm, responds):
    slurm_backend, queued = backend(tmp_path), job(tmp_path)
    slurm_backend.submit(queued)
    if not responds:
        slurm.is_down()
    slurm_backend.kill("dataset")
    slurm_backend.kill("dataset")
    assert [outcome.state for outcome in slurm_backend.poll(0.0)] == ["lost"]
    cancelled = (slurm.folder / "cancelled").read_text().splitlines()
    assert len(cancelled) == 1 and f"--name=ddm-{run_folder(tmp_path).run_id()}-dataset-0-a1" in cancelled[0]
    assert worker(queued).wait() == 1


def test_attach_finds_queued_and_abandons_missing(tmp_path, slurm):
    queued, never = job(tmp_path), job(tmp_path, stage="codec")
    backend(tmp_path).submit(queued)
    later = backend(tmp_path)
    assert later.attach(queued) and not later.attach(never)
    assert not claim(attempt_folder(never))


def test_claim_with_many_processes_succeeds_once(tmp_path):
    children = []
    for _ in range(12):
        if not (child := os.fork()):
            os._exit(0 if claim(tmp_path) else 1)
        children.append(child)
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    assert codes == [0] + 11 * [1]
    assert [path.name for path in tmp_path.iterdir()] == ["claim.json"]


def worker(submitted: Job) -> subprocess.Popen:
    command = [sys.executable, "-m", "orchestrator.backends.slurm_worker", str(attempt_folder(submitted))]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def wait_until(condition, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition is still false"
        time.sleep(0.02)


class Story:
    """A run of digits whose expert is preempted at its start, then killed, then orphaned by its controller.

    The stages before the expert run on the inline backend in the same run folder, which is faster.
    """

    OVERRIDES = (
        "experiment=digits",
        "compute=slurm",
        "+compute.slurm.cluster=local",
        "compute.backoff_s=0.1",
        "partition.num_experts=1",
        "monolith=false",
        "wandb.mode=disabled",
        "data.limit=300",
        "expert.training.steps=40",
        "scores.num_samples=64",
        "scores.spaces=[pixels]",
        "ensemble.steps=4",
    )

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = parse_config(compose([*self.OVERRIDES, "expert.training.steps=5", f"folder={folder}"]))
        run_pipeline(replace(config, compute=ComputeConfig(backend="inline")), Console(quiet=True))
        shutil.rmtree(folder / "work")
        (folder / "journal.jsonl").unlink()
        command = [sys.executable, "-m", "orchestrator", "run", *self.OVERRIDES, f"folder={folder}"]
        self.controller = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            os.kill(self.claimed(1), signal.SIGUSR2)
            os.kill(self.claimed(2), signal.SIGKILL)
            self.survivor = self.claimed(3)
            self.end()
            run_pipeline(RunFolder(folder).load_config(), Console(quiet=True))
        finally:
            self.end()
            for attempt in folder.glob("work/*/attempt_*/claim.json"):
                with suppress(ProcessLookupError):
                    os.kill(read_json(attempt)["pid"], signal.SIGKILL)

    def end(self) -> None:
        self.controller.kill()
        self.controller.wait()

    def claimed(self, attempt: int) -> int:
        """Return the pid of the expert's attempt as soon as it has a claim; it then still imports torch."""
        claims = f"work/expert_0-*/attempt_{attempt}/claim.json"
        wait_until(lambda: list(self.folder.glob(claims)) or self.controller.poll() is not None)
        (claim_path,) = self.folder.glob(claims)
        return int(read_json(claim_path)["pid"])

    def events(self, stage: str) -> list[tuple[str, int]]:
        lines = (self.folder / "journal.jsonl").read_text().splitlines()
        events = [event for event in map(json.loads, lines) if event.get("stage") == stage]
        return [(event["event"], event["attempt"]) for event in events]


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    return Story(tmp_path_factory.mktemp("story") / "run")


@pytest.mark.integration
class TestRunWithSubmitit:
    def test_journal_records_every_end(self, story):
        assert story.events("expert_0") == [
            ("submitted", 1),
            ("preempted", 1),
            ("submitted", 2),
            ("lost", 2),
            ("submitted", 3),
            ("attached", 3),
            ("finished", 3),
        ]

    def test_surviving_worker_is_kept(self, story):
        (worker,) = story.folder.glob("work/expert_0-*/attempt_3/worker.json")
        assert read_json(worker)["pid"] == story.survivor

    def test_other_stages_run_once_and_run_finishes(self, story):
        for stage in ("ensemble", "score_sticky"):
            assert story.events(stage) == [("submitted", 1), ("finished", 1)]
        assert read_holder(RunFolder(story.folder)) is None
        assert len(list(story.folder.glob("artifacts/score*/manifest.json"))) == 2

    def test_run_writes_no_pickle(self, story):
        assert not [path for path in story.folder.rglob("*") if "pickle" in path.name or path.suffix == ".pkl"]
