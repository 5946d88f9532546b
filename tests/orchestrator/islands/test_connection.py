"""The controller's side of one island, with a real storage and an island that says what it is told to say."""

import queue
import time
from dataclasses import dataclass, field

import pytest

from ddm_core.artifacts import publish, write_json
from orchestrator.config.compute import IslandConfig
from orchestrator.errors import IslandError, Unreachable
from orchestrator.islands import connection as line_module
from orchestrator.islands.client import JobState
from orchestrator.islands.connection import IslandConnection
from orchestrator.islands.layout import names_of
from orchestrator.run.backend import AttemptOutcome, Job, attempt_folder, submission_name

RUN_ID = "0a1b2c3d"


@dataclass
class FakeIsland:
    """Takes every submission and says of it what it was told to."""

    says: dict[str, JobState] = field(default_factory=dict)
    answers: bool = True
    stopped: list[str] = field(default_factory=list)
    submitted: list[str] = field(default_factory=list)

    def _refuse(self):
        if not self.answers:
            raise Unreachable("no answer")

    def check_reachable(self):
        self._refuse()

    def submit(self, submission_id, command, **options):
        self._refuse()
        self.submitted.append(submission_id)
        self.says.setdefault(submission_id, JobState(status="RUNNING"))

    def states(self):
        self._refuse()
        return dict(self.says)

    def stop(self, submission_id):
        self.stopped.append(submission_id)

    def log(self, submission_id):
        raise IslandError("no log")


@pytest.fixture
def bed(tmp_path, monkeypatch):
    """A line to a fake island, its events, and one job of it."""
    monkeypatch.setattr(line_module, "POLL_INTERVAL_S", 0.02)
    run, token = tmp_path / "run", tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o600)
    events: list[tuple[str, dict]] = []
    line = IslandConnection(
        name="west",
        config=IslandConfig(address="http://127.0.0.1:1", token_file=str(token), storage=str(tmp_path / "storage")),
        run_root=run,
        run_id=RUN_ID,
        wheel=tmp_path / "ddm.whl",
        event=lambda name, **facts: events.append((name, facts)),
        lease_s=1.0,
        grace_s=1.0,
        outcomes=queue.Queue(),
    )
    line.client = FakeIsland()
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
    yield line, job, events
    line.close()


def outcome_of(line: IslandConnection, limit_s: float = 10.0) -> AttemptOutcome:
    line.start_polling()
    give_up = time.monotonic() + limit_s
    while time.monotonic() < give_up:
        line.start_polling()
        try:
            return line.outcomes.get(timeout=0.05)
        except queue.Empty:
            continue
    raise AssertionError("no outcome")


def said(line: IslandConnection, job: Job, outcome: dict) -> None:
    """The attempt writes its end into the storage, as its worker would."""
    away = line.run_root.parent / "away"
    away.mkdir()
    write_json(away / "outcome.json", outcome)
    line.storage.put_tree(away, names_of(job).folder)


def ended(line: IslandConnection, job: Job, **facts) -> None:
    line.client.says[submission_name(RUN_ID, job)] = JobState(status="FAILED", **facts)


def test_what_an_attempt_says_of_its_end_is_brought_home(bed):
    line, job, _ = bed
    said(line, job, {"stage": "expert_0", "attempt": 1, "state": "preempted", "error": "stopped at step 7"})
    ended(line, job)
    line.add(job)
    outcome = outcome_of(line)
    assert (outcome.state, outcome.error) == ("preempted", "stopped at step 7")
    assert line.client.submitted == [submission_name(RUN_ID, job)]


@pytest.mark.parametrize("damaged", [{"state": "finished"}, {"stage": "expert_0", "attempt": 1, "state": "rich"}])
def test_an_end_that_makes_no_sense_is_a_loss_and_is_kept_aside(bed, damaged):
    line, job, _ = bed
    said(line, job, damaged)
    ended(line, job)
    line.add(job)
    outcome = outcome_of(line)
    assert outcome.state == "lost" and outcome.transient and "does not say how an attempt ended" in outcome.error
    assert sorted(path.name for path in attempt_folder(job).iterdir()) == ["outcome.damaged"]


def test_an_artifact_that_did_not_arrive_is_not_believed(bed):
    line, job, _ = bed
    said(line, job, {"stage": "expert_0", "attempt": 1, "state": "finished"})
    ended(line, job)
    line.add(job)
    outcome = outcome_of(line)
    assert outcome.state == "failed" and outcome.transient


def test_an_artifact_comes_home_whole(bed, tmp_path):
    line, job, _ = bed
    made = tmp_path / "made"
    publish(made, lambda out: (out / "weights").write_bytes(b"w") and 0.0, stage="expert_0", config={}, inputs={})
    line.storage.put_tree(made, names_of(job).artifact)
    said(line, job, {"stage": "expert_0", "attempt": 1, "state": "finished"})
    ended(line, job)
    line.add(job)
    assert outcome_of(line).state == "finished"
    assert (line.run_root / "artifacts" / "expert_0-ff" / "weights").read_bytes() == b"w"


@pytest.mark.parametrize(
    ("error_type", "state", "transient"),
    [("RUNTIME_ENV_SETUP_FAILURE", "failed", False), ("JOB_SUPERVISOR_ACTOR_DIED", "lost", True)],
)
def test_one_that_left_no_word_is_lost_unless_its_environment_could_not_be_made(bed, error_type, state, transient):
    line, job, _ = bed
    ended(line, job, error_type=error_type)
    line.add(job)
    outcome = outcome_of(line)
    assert (outcome.state, outcome.transient) == (state, transient)
    assert "could not be fetched" in (attempt_folder(job) / "driver.txt").read_text()


def test_an_island_that_never_answers_has_lost_its_stages_after_the_lease_and_not_before(bed):
    line, job, events = bed
    line.client.answers = False
    started = time.monotonic()
    line.connect()
    line.add(job)
    outcome = outcome_of(line)
    assert outcome.state == "lost" and outcome.transient and time.monotonic() - started >= line.lease_s
    assert [name for name, _ in events] == ["unreachable"]


def test_one_that_says_running_without_a_sign_of_life_is_lost_after_the_lease(bed):
    line, job, _ = bed
    line.storage.put_json(names_of(job).beat, {"beats": 3})
    line.add(job)
    outcome = outcome_of(line)
    assert outcome.state == "lost" and "no sign of life" in outcome.error


def test_what_nobody_waits_for_is_stopped_and_what_belongs_to_other_runs_is_not(bed):
    line, job, events = bed
    mine, others = f"ddm-{RUN_ID}-expert_9-aa-a1", "ddm-99999999-expert_9-aa-a1"
    line.client.says = {name: JobState(status="RUNNING") for name in (mine, others)}
    line.add(job)
    line.start_polling()
    give_up = time.monotonic() + 5
    while not events and time.monotonic() < give_up:
        time.sleep(0.02)
    assert events[0] == ("reaped", {"island": "west", "submission": mine})
    assert others not in line.client.stopped and submission_name(RUN_ID, job) not in line.client.stopped


def test_a_defect_in_a_thread_is_raised_where_it_is_seen(bed):
    line, job, _ = bed
    line.client.submit = None
    line.add(job)
    with pytest.raises(TypeError):
        outcome_of(line)
