"""The controller as a job on a Ray cluster: one at a time, identified by its run folder, with a check of the path."""

import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ddm_core.artifacts import read_json, write_json
from orchestrator.cli import submit as submission
from orchestrator.cli.app import app
from orchestrator.cli.submit import confirm_submission, resolve_submission, submit_run, wait_until_started
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
    """A fake of a Ray cluster's job API."""

    jobs: dict[str, JobState] = field(default_factory=dict)
    sent: list[dict] = field(default_factory=list)
    was_overtaken: bool = False

    def check_reachable(self) -> str:
        return "2"

    def list_states(self) -> dict[str, JobState]:
        return dict(self.jobs)

    def submit(self, submission_id, command, **options) -> bool:
        assert options["wheel"].is_file()
        self.jobs[submission_id] = JobState(status="PENDING")
        self.sent.append(options | {"command": command})
        return not self.was_overtaken

    def fetch_log(self, submission_id) -> str:
        return "first line\nlast line\n"


def config(folder: Path, **compute) -> RunConfig:
    return RunConfig(folder=str(folder), compute=ComputeConfig(**compute))


def lock_elsewhere(run: RunFolder, age_s: float) -> None:
    """Write a lease of a controller on another machine, with a heartbeat of this age."""
    lease = run.controllers / "1.json"
    write_json(lease, this_process() | {"host": "another-host"})
    os.utime(lease, (time.time() - age_s,) * 2)


def test_submit_sends_one_fixed_command(tmp_path):
    cluster = Cluster()
    folder = tmp_path / "a run; rm -rf $HOME"
    result = submit_run(config(folder, grace_s=20.0), cluster)
    assert result.is_new and result.id == f"ddm-{RunFolder(folder).run_id()}-c1"
    (job,) = cluster.sent
    assert job["command"] == ["python", "-P", "-m", "orchestrator.cli.submitted_controller", str(folder), result.id]
    assert job["env"] == {"DDM_SUBMITTED_TO": "auto"}
    assert job["resources"].cpus == 1 and job["grace_s"] >= 20 + 10
    assert RunFolder(folder).load_config() == config(folder, grace_s=20.0)


@pytest.mark.parametrize("status", ["PENDING", "RUNNING"])
def test_submit_while_controller_active_sends_nothing(tmp_path, status):
    cluster = Cluster()
    first = submit_run(config(tmp_path), cluster)
    cluster.jobs[first.id] = JobState(status=status)
    again = submit_run(config(tmp_path), cluster)
    assert (again.id, again.is_new) == (first.id, False) and len(cluster.sent) == 1


def test_submit_overtaken_by_another_is_not_new(tmp_path):
    assert not submit_run(config(tmp_path), Cluster(was_overtaken=True)).is_new


@pytest.mark.parametrize(("status", "failure"), [("SUCCEEDED", ""), ("FAILED", "ended as FAILED: out of memory")])
def test_submit_after_end_uses_next_number(tmp_path, status, failure):
    cluster = Cluster()
    for number in range(1, 12):
        result = submit_run(config(tmp_path), cluster)
        assert result.id.endswith(f"-c{number}")
        cluster.jobs[result.id] = JobState(status=status, message="out of memory")
    assert failure in result.previous_failure and bool(failure) == ("last line" in result.previous_failure)


def test_submit_run_locked_elsewhere_is_an_error(tmp_path):
    cluster, run = Cluster(), RunFolder(tmp_path)
    lock_elsewhere(run, age_s=5.0)
    with pytest.raises(RunIsLocked, match="another-host"):
        submit_run(config(tmp_path), cluster)
    assert not cluster.sent and not (tmp_path / "config.yaml").exists()
    lock_elsewhere(run, age_s=500.0)
    assert submit_run(config(tmp_path), cluster).is_new


def test_status_and_stop_reach_controller_elsewhere(tmp_path):
    run = RunFolder(tmp_path)
    run.save_config(config(tmp_path))
    lock_elsewhere(run, age_s=5.0)
    title = str(status_table(run).renderables[0])
    assert "controlled by process" in title and "another-host" in title
    app(["stop", str(tmp_path)], standalone_mode=False)
    assert run.stop.exists()
    lock_elsewhere(run, age_s=500.0)
    assert "is gone" in str(status_table(run).renderables[0])


def test_resolve_submission_makes_folder_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    resolved, _ = resolve_submission(config(Path("runs/demo")), "http://127.0.0.1:1", "token")
    assert resolved.folder == str(tmp_path / "runs" / "demo")


def test_resolve_submission_invalid_address_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="--address.*ray://head"):
        resolve_submission(config(tmp_path), "ray://head:10001", "token")


def test_confirm_submission_writes_its_host(tmp_path):
    result = submit_run(config(tmp_path), cluster := Cluster())
    confirm_submission(RunFolder(tmp_path), result.id)
    assert read_json(tmp_path / "submission.json")["seen"]["host"] == socket.gethostname()
    wait_until_started(result, cluster, 1.0)


@pytest.mark.parametrize(
    "existing", [None, {"id": "ddm-00000000-c1"}, {"id": "ddm-x-c2", "seen": {"host": "x", "pid": 1, "started": None}}]
)
def test_confirm_submission_in_other_folder_is_an_error(tmp_path, monkeypatch, existing):
    monkeypatch.setattr(submission, "FOLDER_VISIBLE_S", 0.0)
    if existing:
        write_json(tmp_path / "submission.json", existing)
    with pytest.raises(RunFolderError, match="sees under the same path"):
        confirm_submission(RunFolder(tmp_path), "ddm-x-c1")
    assert (read_json(tmp_path / "submission.json") if existing else None) == existing


def test_submitted_controller_missing_folder_exits(tmp_path, monkeypatch):
    monkeypatch.setattr(submission, "FOLDER_VISIBLE_S", 0.0)
    with pytest.raises(SystemExit, match="^Error: .*is not the folder from which ddm-x-c1 was submitted"):
        main([str(tmp_path / "nowhere"), "ddm-x-c1"])


def test_wait_until_started_reports_late_and_failed_jobs(tmp_path):
    result = submit_run(config(tmp_path), cluster := Cluster())
    with pytest.raises(OrchestratorError, match="no CPU free"):
        wait_until_started(result, cluster, 0.0)
    cluster.jobs[result.id] = JobState(status="FAILED", message="exit code 1")
    with pytest.raises(OrchestratorError, match="exit code 1\n  first line\n  last line"):
        wait_until_started(result, cluster, 1.0)


TINY = (
    "experiment=digits",
    "compute=ray_local",
    "partition.num_experts=1",
    "monolith=false",
    "wandb.mode=disabled",
    "data.limit=300",
    "scores.num_samples=64",
    "scores.spaces=[pixels]",
    "ensemble.steps=4",
)


def wait_until(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "the condition is still false"
        time.sleep(0.05)


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_submit_stopped_controller_can_be_resubmitted(tmp_path, capsys):
    def ddm(*arguments: str) -> str:
        app(arguments, standalone_mode=False)
        return capsys.readouterr().out

    with LocalIslands(tmp_path / "islands", count=1, cpus=2) as islands:
        island, folder = islands.configs["island_1"], tmp_path / "run"
        submit = ("submit", "--address", island.address, "--token-file", island.token_file, f"folder={folder}", *TINY)
        output = ddm(*submit, "expert.training.steps=20000", "--wait")
        first = f"ddm-{RunFolder(folder).run_id()}-c1"
        assert f"Submitted {first}" in output and f"ddm stop {folder}" in output
        wait_until(lambda: list(folder.glob("work/expert_0-*/attempt_1/progress.json")))
        assert "nothing was submitted" in ddm(*submit)

        commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in islands.list_processes("island_1")]
        assert sum(b"gcs_server" in command.split(b"\0")[0] for command in commands) == 1  # its stages run on it, too
        (worker,) = folder.glob("work/expert_0-*/attempt_1/worker.json")
        assert read_json(worker)["pid"] in islands.list_processes("island_1")
        assert "controlled by process" in " ".join(ddm("status", str(folder)).split())
        ddm("stop", str(folder))
        _, client = resolve_submission(config(folder), island.address, island.token_file)
        wait_until(lambda: client.list_states()[first].has_ended)
        assert "preempted" in ddm("status", str(folder))

        second = f"{first[:-1]}2"
        assert f"Submitted {second}" in ddm(*submit, "expert.training.steps=40")
        wait_until(lambda: client.list_states()[second].has_ended)
        assert client.list_states()[second].status == "SUCCEEDED" and (folder / "report.html").is_file()
