"""One island as the controller sees it: a thread that sends inputs, submits, watches and brings home.

Each island has a line of its own, so that one that does not answer delays no other. A job that the island says has
ended has ended. That it runs is believed only as long as it shows signs of life: an island that was restarted may
remember jobs that died with it. While it does not answer, its jobs are *unknown*; they are given up when the lease has
passed.
"""

import json
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ddm_core.artifacts import CACHE, MANIFEST, ArtifactError, CorruptArtifact, is_finished
from orchestrator.config.compute import IslandConfig
from orchestrator.errors import IslandError, OrchestratorError, Unreachable
from orchestrator.islands.client import IslandClient, JobState
from orchestrator.islands.layout import Names, digest, names_of, rebase_paths, spec_of
from orchestrator.islands.storage.storage import Storage, StorageError, StorageUnreachable, TransferStats
from orchestrator.islands.worker import SENT_ROOT
from orchestrator.run.backend import AttemptOutcome, Job, State, attempt_folder, read_outcome, submission_name

log = logging.getLogger(__name__)

POLL_INTERVAL_S = 1.0
"""How often an island is asked."""

Event = Callable[..., None]
"""`event(name, **facts)`, into the journal."""


@dataclass(slots=True)
class RemoteAttempt:
    """An attempt on an island, as far as the controller knows."""

    job: Job
    submission_id: str
    last_heartbeat: float
    """When the island or the storage last showed that it may be alive (monotonic clock)."""
    is_submitted: bool = False
    stop_was_sent: bool = False
    is_ending: bool = False
    heartbeat: int = 0

    @property
    def names(self) -> Names:
        """Where its things are in the storage."""
        return names_of(self.job)

    def outcome(self, state: State, error: str, *, transient: bool) -> AttemptOutcome:
        """How it ended, where it cannot say so itself."""
        return AttemptOutcome(
            stage=self.job.stage, attempt=self.job.attempt, state=state, error=error, transient=transient
        )


@dataclass
class IslandConnection:
    """The controller's side of one island."""

    name: str
    config: IslandConfig
    run_root: Path
    run_id: str
    wheel: Path
    event: Event
    lease_s: float
    grace_s: float
    outcomes: "queue.Queue[AttemptOutcome]"
    client: IslandClient = field(init=False)
    storage: Storage = field(init=False)
    tracks: dict[str, RemoteAttempt] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)
    """Stages that have been on this island."""
    unreachable_since: float | None = None
    """Seconds since the epoch."""
    reason: str = ""

    def __post_init__(self) -> None:
        self.client = IslandClient(self.name, self.config)
        self.storage = Storage(f"{self.config.storage.rstrip('/')}/{self.run_id}", self.config.storage_options)
        self._ended = threading.Event()
        self._movers = ThreadPoolExecutor(max_workers=2, thread_name_prefix=f"{self.name}-mover")
        self._watcher = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"{self.name}-line")
        self._watching: Future[None] | None = None
        self._defects: list[BaseException] = []

    def connect(self) -> None:
        """Check that the island takes us, if it answers; raises `IslandError` if it refuses."""
        try:
            self.client.check_reachable()
        except Unreachable as error:
            self._record_unreachable(error)

    def start_polling(self) -> None:
        """Look from now on, once all attempts of an earlier controller were added.

        Whatever runs there for this run without having been added is stopped: nobody waits for it. Raises what none
        of this line's threads should have raised: nobody would bring home what it was about.
        """
        if self._watching is None:
            self._watching = self._watcher.submit(self._poll_loop)
            self._watching.add_done_callback(self._record_defect)
        if self._defects:
            raise self._defects[0]

    def close(self) -> None:
        """Leave the island alone; what runs there goes on."""
        self._ended.set()
        self._movers.shutdown(wait=True, cancel_futures=True)
        self._watcher.shutdown(wait=True)

    def add(self, job: Job) -> None:
        """Send a job to the island, or find it there if it was sent before."""
        track = RemoteAttempt(job, submission_name(self.run_id, job), time.monotonic())
        self.tracks[job.stage] = track
        self.held.add(job.stage)
        self._submit(track, self._send)

    def stop(self, stage: str) -> None:
        """Stop an attempt now, with the island's grace."""
        if (track := self.tracks.get(stage)) and track.is_submitted:
            self._submit(track, self._send_stop)

    # ---- sending

    def _send(self, track: RemoteAttempt) -> None:
        """Inputs, checkpoint, job, submission, in this order; each of them a second time changes nothing."""
        job, names = track.job, track.names
        if self.storage.get_json(names.job) is None:
            for path in {Path(path) for path in job.inputs.values()}:
                name = str(path.relative_to(self.run_root))
                if not self.storage.has_tree(name):
                    self._moved(track, self.storage.put_tree(path, name), "out")
            if Path(job.scratch).is_dir():
                self._moved(track, self.storage.put_tree(Path(job.scratch), names.state, skip=(CACHE,)), "out")
        spec = spec_of(rebase_paths(job, self.run_root, SENT_ROOT))
        self.storage.put_json(names.job, spec)
        self.client.check_reachable()
        self.client.submit(
            track.submission_id,
            self._command(names, digest(spec)),
            wheel=self.wheel,
            resources=job.resources,
            grace_s=self.grace_s,
        )
        track.is_submitted, track.last_heartbeat = True, time.monotonic()

    def _command(self, names: Names, checksum: str) -> list[str]:
        options = json.dumps(self.config.storage_options)
        given = ["--storage", self.storage.url, "--options", options, "--job", names.job, "--digest", checksum]
        return ["python", "-m", "orchestrator.islands.worker", *given]

    def _send_stop(self, track: RemoteAttempt) -> None:
        self.client.stop(track.submission_id)

    def _submit(self, track: RemoteAttempt, act: Callable[[RemoteAttempt], None]) -> None:
        """Do something for an attempt in a thread of its own."""
        self._movers.submit(self._poll_once, track, act).add_done_callback(self._record_defect)

    def _record_defect(self, done: "Future[None]") -> None:
        if not done.cancelled() and (error := done.exception()) is not None:
            self._defects.append(error)

    def _poll_once(self, track: RemoteAttempt, act: Callable[[RemoteAttempt], None]) -> None:
        """Do something for an attempt, again while the island or its storage does not answer; a refusal ends it."""
        while not self._ended.is_set():
            try:
                act(track)
            except (Unreachable, StorageUnreachable) as error:
                if time.monotonic() - track.last_heartbeat > self.lease_s:
                    self._finish_attempt(track, track.outcome("lost", str(error), transient=True))
                    return
                self._ended.wait(POLL_INTERVAL_S)
            except (OrchestratorError, ArtifactError, OSError) as error:
                may_pass = isinstance(error, IslandError | StorageError | ArtifactError | OSError)
                self._finish_attempt(
                    track, track.outcome("failed", f"{type(error).__name__}: {error}", transient=may_pass)
                )
                return
            else:
                return

    # ---- watching

    def _poll_loop(self) -> None:
        while not self._ended.wait(POLL_INTERVAL_S):
            states = self._poll_jobs()
            for track in list(self.tracks.values()):
                if track.is_submitted and not track.is_ending:
                    self._check_attempt(track, states)
            if states is not None:
                self._stop_unknown_jobs(states)

    def _poll_jobs(self) -> dict[str, JobState] | None:
        """What the island says; None while it does not answer."""
        try:
            states = self.client.states()
        except IslandError as error:
            self._record_unreachable(error)
            return None
        if self.unreachable_since is not None:
            self.event("recovered", island=self.name, seconds=round(time.time() - self.unreachable_since, 1))
            self.unreachable_since, self.reason = None, ""
        return states

    def _record_unreachable(self, error: IslandError) -> None:
        if self.unreachable_since is None:
            self.unreachable_since, self.reason = time.time(), str(error)
            self.event("unreachable", island=self.name, error=str(error))

    def _check_attempt(self, track: RemoteAttempt, states: dict[str, JobState] | None) -> None:
        """What has become of one attempt."""
        now = time.monotonic()
        state = states.get(track.submission_id) if states is not None else None
        running = state if state is not None and not state.has_ended else None
        news = self._sync_attempt_folder(track)
        if news or (running and (running.status == "PENDING" or not track.heartbeat or news is None)):
            track.last_heartbeat = now
        is_overdue = now - track.last_heartbeat > self.lease_s
        if running:
            self._forward_stop(track)
            if not is_overdue:
                return
        if (state and not running) or (attempt_folder(track.job) / "outcome.json").exists():
            track.is_ending = True
            self._submit(track, lambda track: self._collect_results(track, state))
        elif is_overdue:
            what = "does not answer" if states is None else f"calls the attempt {state.status if state else 'unknown'}"
            reason = f"island {self.name} {what} and gave no sign of life for {self.lease_s:g} s (compute.lease_s)"
            self._submit(track, lambda track: self._fail_attempt(track, reason))
            track.is_ending = True

    def _sync_attempt_folder(self, track: RemoteAttempt) -> bool | None:
        """Fetch what the attempt has written about itself; whether there is a new beat, None if nobody can tell."""
        try:
            self.storage.sync_tree(track.names.folder, attempt_folder(track.job))
            beat = self.storage.get_json(track.names.beat)
        except (StorageError, OSError) as error:
            log.warning("%s: %s", self.name, error)
            return None
        beats = int(beat["beats"]) if beat else 0
        grown, track.heartbeat = beats != track.heartbeat, beats
        return grown

    def _forward_stop(self, track: RemoteAttempt) -> None:
        """Tell the island once that the attempt is to stop."""
        if not track.stop_was_sent and any(Path(path).exists() for path in track.job.stop_files):
            track.stop_was_sent = True
            self._submit(track, self._send_stop)

    def _stop_unknown_jobs(self, states: dict[str, JobState]) -> None:
        """Stop what runs there for this run and nobody waits for: attempts that were given up."""
        watched = {track.submission_id for track in self.tracks.values()}
        for submission_id, state in states.items():
            if submission_id.startswith(f"ddm-{self.run_id}-") and submission_id not in watched and not state.has_ended:
                try:
                    self.client.stop(submission_id)
                    self.event("reaped", island=self.name, submission=submission_id)
                except IslandError as error:
                    log.warning("%s: %s", self.name, error)

    # ---- bringing home

    def _collect_results(self, track: RemoteAttempt, state: JobState | None) -> None:
        """Copy what an ended attempt has left, and say how it ended."""
        self.storage.sync_tree(track.names.folder, attempt_folder(track.job))
        outcome = self._read_outcome(track)
        if outcome is None and state is not None:
            self._save_driver_log(track)
        outcome = outcome or _lost_outcome(track.job, state)
        if outcome.state == "finished":
            self._fetch_artifact(track)
        else:
            self._fetch_state(track)
        self._finish_attempt(track, outcome)

    def _read_outcome(self, track: RemoteAttempt) -> AttemptOutcome | None:
        """What the attempt says of its end; what makes no sense is kept aside, and counts as a loss."""
        try:
            return read_outcome(track.job)
        except CorruptArtifact as error:
            written = attempt_folder(track.job) / "outcome.json"
            written.rename(written.with_suffix(".damaged"))
            return track.outcome("lost", str(error), transient=True)

    def _fetch_artifact(self, track: RemoteAttempt) -> None:
        target = Path(track.job.artifact)
        if not is_finished(target):
            self._moved(track, self.storage.get_tree(track.names.artifact, target), "in")
        if not is_finished(target):
            raise StorageError(f"{track.names.artifact} came from {self.name} without its {MANIFEST}; it is run again")

    def _fetch_state(self, track: RemoteAttempt) -> None:
        if self.storage.has_tree(track.names.state):
            self._moved(track, self.storage.get_tree(track.names.state, Path(track.job.scratch)), "in")

    def _fail_attempt(self, track: RemoteAttempt, reason: str) -> None:
        """Take the checkpoints home if the storage still answers, and let the stage go elsewhere."""
        try:
            self._fetch_state(track)
        except StorageError as error:
            log.warning("%s: its checkpoints stay there: %s", self.name, error)
        self._finish_attempt(track, track.outcome("lost", reason, transient=True))

    def _save_driver_log(self, track: RemoteAttempt) -> None:
        """Keep what a process printed that did not live to say how it ended."""
        try:
            text = self.client.log(track.submission_id)
        except IslandError as error:
            text = f"its output could not be fetched: {error}\n"
        (attempt_folder(track.job) / "driver.txt").write_text(text, encoding="utf-8")

    def _moved(self, track: RemoteAttempt, moved: TransferStats, direction: str) -> None:
        if moved.bytes:
            facts: dict[str, Any] = {"stage": track.job.stage, "attempt": track.job.attempt, "direction": direction}
            self.event("moved", island=self.name, bytes=moved.bytes, files=moved.files, **facts)

    def _finish_attempt(self, track: RemoteAttempt, outcome: AttemptOutcome) -> None:
        if self.tracks.get(track.job.stage) is track:
            del self.tracks[track.job.stage]
        self.outcomes.put(outcome)


def _lost_outcome(job: Job, state: JobState | None) -> AttemptOutcome:
    """How an attempt ended that left no outcome: its process, node or environment is gone."""
    outcome = AttemptOutcome(stage=job.stage, attempt=job.attempt, state="lost", transient=True)
    if state is None:
        return outcome
    if state.error_type == "RUNTIME_ENV_SETUP_FAILURE":
        return replace(outcome, state="failed", transient=False, error=f"its environment: {state.message}")
    code = "" if state.exit_code is None else f", exit code {state.exit_code}"
    return replace(outcome, error=f"{state.error_type or state.status}{code}: {state.message[:200]}")
