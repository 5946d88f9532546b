"""Connection to one island, with a real storage and a fake island that reports configured states."""

import queue
import time
from dataclasses import dataclass, field

import pytest

from ddm_core.artifacts import publish, write_json
from orchestrator.config.compute import IslandConfig
from orchestrator.errors import IslandError, Unreachable
from orchestrator.islands import connection as connection_module
from orchestrator.islands.client import JobState
from orchestrator.islands.connection import IslandConnection
from orchestrator.islands.layout import get_attempt_names
from orchestrator.run.backend import AttemptOutcome, Job, attempt_folder, submission_name

RUN_ID = "0a1b2c3d"


@dataclass
class FakeIsland:
    """Accepts every submission and reports its configured state."""

    reported: dict[str, JobState] = field(default_factory=dict)
    is_reachable: bool = True
    stopped: list[str] = field(default_factory=list)
    submitted: list[str] = field(default_factory=list)

    def _check_reachable(self):
        if not self.is_reachable:
            raise Unreachable("no response")

    def check_reachable(self):
        self._check_reachable()

    def submit(self, submission_id, command, **options):
        self._check_reachable()
        self.submitted.append(submission_id)
        self.reported.setdefault(submission_id, JobState(status="RUNNING"))

    def list_states(self):
        self._check_reachable()
        return dict(self.reported)

    def stop(self, submission_id):
        self.stopped.append(submission_id)

    def fetch_log(self, submission_id):
        raise IslandError("no log")


@pytest.fixture
def setup(tmp_path, monkeypatch):
    """Yield a connection to a fake island, one job of it, and the recorded events."""
    monkeypatch.setattr(connection_module, "POLL_INTERVAL_S", 0.02)
    run, token = tmp_path / "run", tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o600)
    events: list[tuple[str, dict]] = []
    connection = IslandConnection(
        name="west",
        config=IslandConfig(address="http://127.0.0.1:1", token_file=str(token), storage=str(tmp_path / "storage")),
        run_root=run,
        run_id=RUN_ID,
        wheel=tmp_path / "ddm.whl",
        record_event=lambda name, **facts: events.append((name, facts)),
        lease_s=1.0,
        grace_s=1.0,
        outcomes=queue.Queue(),
    )
    connection.client = FakeIsland()
    work = run / "work" / "expert_0-ff"
    job = Job(
        stage="expert_0",
        kind="expert",
        config={},
        inputs={},
        input_fingerprints={},
        artifact=str(run / "artifacts" / "expert_0-ff"),
        scratch=str(work / "state"),
        attempt=1,
        stop_files=(str(run / "stop"),),
        island="west",
    )
    attempt_folder(job).mkdir(parents=True)
    yield connection, job, events
    connection.close()


def wait_for_outcome(connection: IslandConnection, limit_s: float = 10.0) -> AttemptOutcome:
    connection.start_polling()
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        connection.start_polling()
        try:
            return connection.outcomes.get(timeout=0.05)
        except queue.Empty:
            continue
    raise AssertionError("no outcome")


def upload_outcome(connection: IslandConnection, job: Job, outcome: dict) -> None:
    """Write the outcome of an attempt into the storage, as its worker does."""
    folder = connection.run_root.parent / "remote"
    folder.mkdir()
    write_json(folder / "outcome.json", outcome)
    connection.storage.put_tree(folder, get_attempt_names(job).folder)


def end_job(connection: IslandConnection, job: Job, **facts) -> None:
    connection.client.reported[submission_name(RUN_ID, job)] = JobState(status="FAILED", **facts)


def test_outcome_written_by_attempt_is_collected(setup):
    connection, job, _ = setup
    upload_outcome(
        connection, job, {"stage": "expert_0", "attempt": 1, "state": "preempted", "error": "stopped at step 7"}
    )
    end_job(connection, job)
    connection.add(job)
    outcome = wait_for_outcome(connection)
    assert (outcome.state, outcome.error) == ("preempted", "stopped at step 7")
    assert connection.client.submitted == [submission_name(RUN_ID, job)]


@pytest.mark.parametrize("damaged", [{"state": "finished"}, {"stage": "expert_0", "attempt": 1, "state": "rich"}])
def test_outcome_that_is_corrupt_is_lost_and_renamed(setup, damaged):
    connection, job, _ = setup
    upload_outcome(connection, job, damaged)
    end_job(connection, job)
    connection.add(job)
    outcome = wait_for_outcome(connection)
    assert outcome.state == "lost" and outcome.transient and "outcome.json is damaged" in outcome.error
    assert sorted(path.name for path in attempt_folder(job).iterdir()) == ["outcome.damaged"]


def test_outcome_finished_without_artifact_is_failed(setup):
    connection, job, _ = setup
    upload_outcome(connection, job, {"stage": "expert_0", "attempt": 1, "state": "finished"})
    end_job(connection, job)
    connection.add(job)
    outcome = wait_for_outcome(connection)
    assert outcome.state == "failed" and outcome.transient


def test_artifact_of_finished_attempt_is_downloaded(setup, tmp_path):
    connection, job, _ = setup
    artifact = tmp_path / "artifact"
    publish(artifact, lambda out: (out / "weights").write_bytes(b"w") and 0.0, stage="expert_0", config={}, inputs={})
    connection.storage.put_tree(artifact, get_attempt_names(job).artifact)
    upload_outcome(connection, job, {"stage": "expert_0", "attempt": 1, "state": "finished"})
    end_job(connection, job)
    connection.add(job)
    assert wait_for_outcome(connection).state == "finished"
    assert (connection.run_root / "artifacts" / "expert_0-ff" / "weights").read_bytes() == b"w"


@pytest.mark.parametrize(
    ("error_type", "state", "transient"),
    [("RUNTIME_ENV_SETUP_FAILURE", "failed", False), ("JOB_SUPERVISOR_ACTOR_DIED", "lost", True)],
)
def test_attempt_without_outcome_is_lost_or_failed(setup, error_type, state, transient):
    connection, job, _ = setup
    end_job(connection, job, error_type=error_type)
    connection.add(job)
    outcome = wait_for_outcome(connection)
    assert (outcome.state, outcome.transient) == (state, transient)
    assert "could not be fetched" in (attempt_folder(job) / "driver.txt").read_text()


def test_attempt_on_unreachable_island_is_lost_after_lease(setup):
    connection, job, events = setup
    connection.client.is_reachable = False
    started = time.monotonic()
    connection.connect()
    connection.add(job)
    outcome = wait_for_outcome(connection)
    assert outcome.state == "lost" and outcome.transient and time.monotonic() - started >= connection.lease_s
    assert [name for name, _ in events] == ["unreachable"]


def test_running_attempt_without_heartbeat_is_lost_after_lease(setup):
    connection, job, _ = setup
    connection.storage.put_json(get_attempt_names(job).heartbeat, {"beats": 3})
    connection.add(job)
    outcome = wait_for_outcome(connection)
    assert outcome.state == "lost" and "no heartbeat" in outcome.error


def test_unknown_jobs_of_this_run_are_stopped_others_are_not(setup):
    connection, job, events = setup
    unknown, foreign = f"ddm-{RUN_ID}-expert_9-aa-a1", "ddm-99999999-expert_9-aa-a1"
    connection.client.reported = {name: JobState(status="RUNNING") for name in (unknown, foreign)}
    connection.add(job)
    connection.start_polling()
    deadline = time.monotonic() + 5
    while not events and time.monotonic() < deadline:
        time.sleep(0.02)
    assert events[0] == ("reaped", {"island": "west", "submission": unknown})
    assert foreign not in connection.client.stopped and submission_name(RUN_ID, job) not in connection.client.stopped


def test_unexpected_error_in_thread_is_raised_by_poll(setup):
    connection, job, _ = setup
    connection.client.submit = None
    connection.add(job)
    with pytest.raises(TypeError):
        wait_for_outcome(connection)
