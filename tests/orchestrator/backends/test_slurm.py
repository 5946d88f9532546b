"""Stages as Slurm jobs: nothing runs twice, unknown is not dead, and every end is told by its name.

Against programs that answer as Slurm's do where the answer is the point; with submitit's local executor, real
processes and real signals where the processes are.
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
    """Programs with the names of Slurm's, and files that say what they answer."""

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
    found = Slurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{found.folder}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm_queue, "POLL_INTERVAL_S", 0.0)
    return found


def backend(folder, slurm=None, **compute) -> SlurmBackend:
    found = SlurmBackend(ComputeConfig(backend="slurm", slurm=slurm or {}, **compute), run_folder(folder))
    found._queue.pause_s = 0.0
    return found


def job(folder, attempt: int = 1, stage: str = "dataset", **resources) -> Job:
    made = Job(
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
    write_json(attempt_folder(made) / "job.json", made)
    return made


def age(folder: Path) -> None:
    """Let an attempt look as if nothing had happened in it for an hour."""
    for path in (*folder.iterdir(), folder):
        os.utime(path, (time.time() - 3600,) * 2)


@pytest.mark.parametrize(
    ("slurm", "message"),
    [
        ({"cluster": "moon"}, "slurm or local"),
        (LOCAL | {"slurm_partitoin": "gpu"}, "partitoin"),
        (LOCAL | {"timeout_min": "soon"}, "timeout_min"),
        (LOCAL | {"slurm_job_name": "x", "nodes": 2}, "may not set nodes, slurm_job_name"),
    ],
)
def test_parameters_that_make_no_sense_are_refused_before_anything_runs(tmp_path, slurm, message):
    with pytest.raises(ConfigError, match=message):
        backend(tmp_path, slurm)


def test_what_a_slurm_job_cannot_be_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(ConfigError, match="compute.stages.expert.gpus is 0.5.*whole GPUs"):
        backend(tmp_path, LOCAL, stages=StagesConfig(expert=ResourcesConfig(gpus=0.5)))


def test_without_slurm_there_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="srun"):
        backend(tmp_path)


def test_here_stages_wait_for_this_machines_cpus(tmp_path):
    one = backend(tmp_path, LOCAL, cpus=2)
    first, second, third = (job(tmp_path, stage=name, cpus=cpus) for name, cpus in zip("abc", (1, 1, 4), strict=True))
    assert one.place(third) == "slurm"  # larger than the machine, but then it is alone
    for taken in (first, second):
        assert one.place(taken) == "slurm"
        claim(attempt_folder(taken))
        assert one.attach(taken)
    assert one.place(first) is None


def test_the_batch_script_asks_for_what_the_stage_asks_for(tmp_path, slurm):
    given = {"slurm_partition": "gpu", "timeout_min": 90}
    backend(tmp_path, given, grace_s=20.0).submit(job(tmp_path, cpus=3, gpus=2, memory_gb=8))
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
    assert command.endswith(f"{sys.executable} -m orchestrator.backends.slurm_worker {attempt_folder(job(tmp_path))}")


def test_unless_told_otherwise_a_job_has_a_day(tmp_path, slurm):
    backend(tmp_path).submit(job(tmp_path))
    assert "#SBATCH --time=1440\n" in (slurm.folder / "script").read_text()


def test_nothing_is_pickled(tmp_path, slurm):
    backend(tmp_path).submit(job(tmp_path))
    assert not [path for path in tmp_path.rglob("*") if "pickle" in path.name or path.suffix == ".pkl"]


def test_while_slurm_does_not_answer_nothing_is_given_up(tmp_path, slurm):
    one, waiting = backend(tmp_path), job(tmp_path)
    one.submit(waiting)
    slurm.lists()
    slurm.is_down()
    age(attempt_folder(waiting))
    assert one.poll(0.0) == [] and backend(tmp_path).attach(waiting)
    slurm.is_down(False)
    assert [outcome.state for outcome in one.poll(0.0)] == ["lost"]


def test_a_list_from_before_a_submission_says_nothing_of_it(tmp_path, slurm, monkeypatch):
    monkeypatch.setattr(slurm_queue, "POLL_INTERVAL_S", 3600.0)
    one = backend(tmp_path)
    for stage in ("dataset", "codec"):
        one.submit(job(tmp_path, stage=stage))
        assert one.poll(0.0) == []


def test_an_end_that_is_written_down_needs_no_slurm(tmp_path, slurm):
    one, done = backend(tmp_path), job(tmp_path)
    one.submit(done)
    slurm.is_down()
    write_json(attempt_folder(done) / "outcome.json", {"stage": "dataset", "attempt": 1, "state": "finished"})
    assert [outcome.state for outcome in one.poll(0.0)] == ["finished"]


@pytest.mark.parametrize(
    ("word", "state"),
    [("TIMEOUT", "lost"), ("NODE_FAIL", "lost"), ("PREEMPTED", "preempted"), ("COMPLETING", None), ("REQUEUED", None)],
)
def test_what_slurm_says_of_a_job(tmp_path, slurm, word, state):
    one, running = backend(tmp_path), job(tmp_path)
    one.submit(running)
    claim(attempt_folder(running))
    slurm.lists((slurm.folder / "queue").read_text().strip().replace("PENDING", word))
    assert one.poll(0.0) == []  # its folder has changed just now
    age(attempt_folder(running))
    ended = one.poll(0.0)
    assert [outcome.state for outcome in ended] == ([state] if state else [])
    assert not ended or word in ended[0].error


def test_a_job_that_slurm_took_without_saying_so_is_not_submitted_again(tmp_path, slurm):
    (slurm.folder / "stutter").touch()
    one = backend(tmp_path)
    one.submit(job(tmp_path))
    assert one.poll(0.0) == [] and one.attach(job(tmp_path))


def test_a_job_that_slurm_refuses_has_failed_and_never_runs(tmp_path, slurm):
    (slurm.folder / "refuse").touch()
    one, refused = backend(tmp_path), job(tmp_path)
    one.submit(refused)
    (outcome,) = one.poll(0.0)
    assert (outcome.state, outcome.transient) == ("failed", True) and "Invalid account" in outcome.error
    assert not claim(attempt_folder(refused))


@pytest.mark.parametrize("answers", [True, False])
def test_a_queued_job_that_is_killed_never_runs(tmp_path, slurm, answers):
    one, queued = backend(tmp_path), job(tmp_path)
    one.submit(queued)
    if not answers:
        slurm.is_down()
    one.kill("dataset")
    one.kill("dataset")
    assert [outcome.state for outcome in one.poll(0.0)] == ["lost"]
    cancelled = (slurm.folder / "cancelled").read_text().splitlines()
    assert len(cancelled) == 1 and f"--name=ddm-{run_folder(tmp_path).run_id()}-dataset-0-a1" in cancelled[0]
    assert worker(queued).wait() == 1


def test_the_next_controller_finds_what_is_queued_and_forgets_what_never_came(tmp_path, slurm):
    queued, never = job(tmp_path), job(tmp_path, stage="codec")
    backend(tmp_path).submit(queued)
    later = backend(tmp_path)
    assert later.attach(queued) and not later.attach(never)
    assert not claim(attempt_folder(never))


def test_of_many_one_gets_the_claim(tmp_path):
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


def until(true, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it has not come to that"
        time.sleep(0.02)


class Story:
    """A run of digits whose expert is preempted while it starts, then killed, then left alone by its controller.

    What comes before the expert was made by another backend in the same run folder, which is quicker.
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
        """The process of the expert's attempt, as soon as it is there: it then still imports torch."""
        claims = f"work/expert_0-*/attempt_{attempt}/claim.json"
        until(lambda: list(self.folder.glob(claims)) or self.controller.poll() is not None)
        (found,) = self.folder.glob(claims)
        return int(read_json(found)["pid"])

    def events(self, stage: str) -> list[tuple[str, int]]:
        lines = (self.folder / "journal.jsonl").read_text().splitlines()
        told = [event for event in map(json.loads, lines) if event.get("stage") == stage]
        return [(event["event"], event["attempt"]) for event in told]


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    return Story(tmp_path_factory.mktemp("story") / "run")


@pytest.mark.slow
class TestARunThroughSubmitit:
    def test_every_end_of_an_attempt_is_told(self, story):
        assert story.events("expert_0") == [
            ("submitted", 1),
            ("preempted", 1),
            ("submitted", 2),
            ("lost", 2),
            ("submitted", 3),
            ("attached", 3),
            ("finished", 3),
        ]

    def test_what_outlived_its_controller_was_not_disturbed(self, story):
        (worker,) = story.folder.glob("work/expert_0-*/attempt_3/worker.json")
        assert read_json(worker)["pid"] == story.survivor

    def test_everything_else_ran_once_and_the_run_is_whole(self, story):
        for stage in ("ensemble", "score_sticky"):
            assert story.events(stage) == [("submitted", 1), ("finished", 1)]
        assert (
            not list(story.folder.glob("controller.json"))
            and len(list(story.folder.glob("artifacts/score*/manifest.json"))) == 2
        )

    def test_nothing_was_pickled(self, story):
        assert not [path for path in story.folder.rglob("*") if "pickle" in path.name or path.suffix == ".pkl"]
