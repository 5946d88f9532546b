"""The controller as a job on a Ray cluster: one at a time, found again by its run folder, and never trusting a path."""

import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ddm_core.artifacts import read_json, write_json
from orchestrator.cli import submit as submission
from orchestrator.cli.app import app
from orchestrator.cli.submit import confirm_folder_seen, reachable_from, submit_run, wait_until_seen
from orchestrator.cli.submitted_controller import main
from orchestrator.config.compute import ComputeConfig
from orchestrator.config.schema import RunConfig
from orchestrator.errors import ConfigError, OrchestratorError, RunFolderError, RunIsLocked
from orchestrator.islands.client import JobState
from orchestrator.islands.local.clusters import LocalIslands
from orchestrator.reporting.status import status_table
from orchestrator.run.lease import this_process
from orchestrator.run.run_folder import RunFolder


@dataclass
class Cluster:
    """What a Ray cluster's Jobs API does, without a Ray cluster."""

    jobs: dict[str, JobState] = field(default_factory=dict)
    sent: list[dict] = field(default_factory=list)
    was_overtaken: bool = False

    def check_reachable(self) -> str:
        return "2"

    def states(self) -> dict[str, JobState]:
        return dict(self.jobs)

    def submit(self, submission_id, command, **options) -> bool:
        assert options["wheel"].is_file()
        self.jobs[submission_id] = JobState(status="PENDING")
        self.sent.append(options | {"command": command})
        return not self.was_overtaken

    def log(self, submission_id) -> str:
        return "first line\nlast line\n"


def config(folder: Path, **compute) -> RunConfig:
    return RunConfig(folder=str(folder), compute=ComputeConfig(**compute))


def held_elsewhere(run: RunFolder, age_s: float) -> None:
    """A lease that a controller on another machine has touched so long ago."""
    write_json(run.lease, this_process() | {"host": "another-host"})
    os.utime(run.lease, (time.time() - age_s,) * 2)


def test_what_is_sent_is_one_fixed_command(tmp_path):
    cluster = Cluster()
    folder = tmp_path / "a run; rm -rf $HOME"
    sent = submit_run(config(folder, grace_s=20.0), cluster)
    assert sent.is_new and sent.id == f"ddm-{RunFolder(folder).run_id()}-c1"
    (job,) = cluster.sent
    assert job["command"] == ["python", "-m", "orchestrator.cli.submitted_controller", str(folder), sent.id]
    assert job["env"] == {"DDM_SUBMITTED_TO": "auto"}
    assert job["resources"].cpus == 1 and job["grace_s"] >= 20 + 10
    assert RunFolder(folder).load_config() == config(folder, grace_s=20.0)


@pytest.mark.parametrize("status", ["PENDING", "RUNNING"])
def test_while_one_walks_the_run_nothing_is_sent(tmp_path, status):
    cluster = Cluster()
    first = submit_run(config(tmp_path), cluster)
    cluster.jobs[first.id] = JobState(status=status)
    again = submit_run(config(tmp_path), cluster)
    assert (again.id, again.is_new) == (first.id, False) and len(cluster.sent) == 1


def test_of_two_at_the_same_time_one_is_sent(tmp_path):
    assert not submit_run(config(tmp_path), Cluster(was_overtaken=True)).is_new


@pytest.mark.parametrize(("status", "told"), [("SUCCEEDED", ""), ("FAILED", "ended as FAILED: out of memory")])
def test_after_it_has_ended_the_next_has_another_number(tmp_path, status, told):
    cluster = Cluster()
    for number in range(1, 12):
        sent = submit_run(config(tmp_path), cluster)
        assert sent.id.endswith(f"-c{number}")
        cluster.jobs[sent.id] = JobState(status=status, message="out of memory")
    assert told in sent.earlier and bool(told) == ("last line" in sent.earlier)


def test_a_run_that_is_walked_elsewhere_is_refused(tmp_path):
    cluster, run = Cluster(), RunFolder(tmp_path)
    held_elsewhere(run, age_s=5.0)
    with pytest.raises(RunIsLocked, match="another-host"):
        submit_run(config(tmp_path), cluster)
    assert not cluster.sent and not (tmp_path / "config.yaml").exists()
    held_elsewhere(run, age_s=500.0)
    assert submit_run(config(tmp_path), cluster).is_new


def test_status_and_stop_know_a_controller_on_another_machine(tmp_path):
    run = RunFolder(tmp_path)
    run.save_config(config(tmp_path))
    held_elsewhere(run, age_s=5.0)
    assert "controlled by process" in status_table(run).title and "another-host" in status_table(run).title
    app(["stop", str(tmp_path)], standalone_mode=False)
    assert run.stop.exists()
    held_elsewhere(run, age_s=500.0)
    assert "is gone" in status_table(run).title


def test_a_relative_folder_becomes_one_that_means_the_same_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    meant, _ = reachable_from(config(Path("runs/demo")), "http://127.0.0.1:1", "token")
    assert meant.folder == str(tmp_path / "runs" / "demo")


def test_an_address_that_is_none_is_one_clear_error(tmp_path):
    with pytest.raises(ConfigError, match="--address.*ray://head"):
        reachable_from(config(tmp_path), "ray://head:10001", "token")


def test_the_job_answers_what_was_written_for_it(tmp_path):
    sent = submit_run(config(tmp_path), cluster := Cluster())
    confirm_folder_seen(RunFolder(tmp_path), sent.id)
    assert read_json(tmp_path / "submission.json")["seen"]["host"] == socket.gethostname()
    wait_until_seen(sent, cluster, 1.0)


@pytest.mark.parametrize("there", [None, {"id": "ddm-00000000-c1"}, {"id": "ddm-x-c2", "seen": {}}])
def test_another_folder_under_the_same_path_is_refused(tmp_path, monkeypatch, there):
    monkeypatch.setattr(submission, "SEEN_S", 0.0)
    if there:
        write_json(tmp_path / "submission.json", there)
    with pytest.raises(RunFolderError, match="sees under the same path"):
        confirm_folder_seen(RunFolder(tmp_path), "ddm-x-c1")
    assert (read_json(tmp_path / "submission.json") if there else None) == there


def test_a_job_on_a_machine_without_the_folder_ends_with_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(submission, "SEEN_S", 0.0)
    with pytest.raises(SystemExit, match="^Error: .*is not the folder from which ddm-x-c1 was submitted"):
        main([str(tmp_path / "nowhere"), "ddm-x-c1"])


def test_a_job_that_does_not_begin_or_has_failed_is_told(tmp_path):
    sent = submit_run(config(tmp_path), cluster := Cluster())
    with pytest.raises(OrchestratorError, match="no CPU free"):
        wait_until_seen(sent, cluster, 0.0)
    cluster.jobs[sent.id] = JobState(status="FAILED", message="exit code 1")
    with pytest.raises(OrchestratorError, match="exit code 1\n  first line\n  last line"):
        wait_until_seen(sent, cluster, 1.0)


TINY = (
    "experiment=digits",
    "partition.num_experts=1",
    "monolith=false",
    "wandb.mode=disabled",
    "data.limit=300",
    "scores.num_samples=64",
    "ensemble.steps=4",
)


def until(true) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline, "it has not come to that"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_controller_on_a_ray_cluster_is_stopped_and_sent_again(tmp_path, capsys):
    def ddm(*words: str) -> str:
        app(words, standalone_mode=False)
        return capsys.readouterr().out

    with LocalIslands(tmp_path / "islands", count=1, cpus=2) as islands:
        island, folder = islands.configs["island_1"], tmp_path / "run"
        submit = ("submit", "--address", island.address, "--token-file", island.token_file, f"folder={folder}", *TINY)
        said = ddm(*submit, "expert.training.steps=20000", "--wait")
        first = f"ddm-{RunFolder(folder).run_id()}-c1"
        assert f"Submitted {first}" in said and f"ddm stop {folder}" in said
        until(lambda: list(folder.glob("work/expert_0-*/attempt_1/progress.json")))
        assert "nothing was sent" in ddm(*submit)

        commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in islands.processes("island_1")]
        assert sum(b"gcs_server" in command.split(b"\0")[0] for command in commands) == 1  # its stages are on it, too
        (worker,) = folder.glob("work/expert_0-*/attempt_1/worker.json")
        assert read_json(worker)["pid"] in islands.processes("island_1")
        assert "controlled by process" in ddm("status", str(folder))
        ddm("stop", str(folder))
        _, client = reachable_from(config(folder), island.address, island.token_file)
        until(lambda: client.states()[first].has_ended)
        assert "preempted" in ddm("status", str(folder))

        second = f"{first[:-1]}2"
        assert f"Submitted {second}" in ddm(*submit, "expert.training.steps=40")
        until(lambda: client.states()[second].has_ended)
        assert client.states()[second].status == "SUCCEEDED" and (folder / "report.html").is_file()
