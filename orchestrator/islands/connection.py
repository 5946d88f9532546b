"""The controller's connection to one island: a thread that uploads inputs, submits, polls and downloads results.

Each island has a connection of its own, so an island that does not respond delays no other. If the island reports that
a job has ended, it has ended. A report that a job runs counts only while the job's heartbeat changes: a restarted
island may list jobs that died with it. While the island does not respond, its jobs are *unknown*; they are rescheduled
when the lease expires.
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
from orchestrator.islands.layout import AttemptNames, get_attempt_names, hash_spec, rebase_paths, render_job
from orchestrator.islands.storage.storage import Storage, StorageError, StorageUnreachable, TransferStats
from orchestrator.islands.worker import PLACEHOLDER_ROOT
from orchestrator.run.backend import AttemptOutcome, Job, State, attempt_folder, read_outcome, submission_name

log = logging.getLogger(__name__)

POLL_INTERVAL_S = 1.0
"""Seconds between two polls of an island."""

RecordEvent = Callable[..., None]
"""`record_event(name, **facts)` writes to the journal."""


@dataclass(slots=True)
class RemoteAttempt:
    """An attempt on an island, as far as the controller knows."""

    job: Job
    submission_id: str
    last_heartbeat: float
    """When the island or the storage last showed that the attempt may be alive (monotonic clock)."""
    is_submitted: bool = False
    stop_was_sent: bool = False
    is_ending: bool = False
    heartbeat_count: int = 0

    @property
    def names(self) -> AttemptNames:
        """Return the attempt's names in the storage."""
        return get_attempt_names(self.job)

    def make_outcome(self, state: State, error: str, *, transient: bool) -> AttemptOutcome:
        """Return an outcome for an attempt that has written none."""
        return AttemptOutcome(
            stage=self.job.stage, attempt=self.job.attempt, state=state, error=error, transient=transient
        )


@dataclass
class IslandConnection:
    """The controller's connection to one island."""

    name: str
    config: IslandConfig
    run_root: Path
    run_id: str
    wheel: Path
    record_event: RecordEvent
    lease_s: float
    grace_s: float
    outcomes: "queue.Queue[AttemptOutcome]"
    client: IslandClient = field(init=False)
    storage: Storage = field(init=False)
    attempts: dict[str, RemoteAttempt] = field(default_factory=dict)
    """Attempts that have not ended, by stage."""
    stored_stages: set[str] = field(default_factory=set)
    """Stages that have been on this island."""
    unreachable_since: float | None = None
    """Seconds since the epoch; None while the island responds."""
    unreachable_reason: str = ""

    def __post_init__(self) -> None:
        self.client = IslandClient(self.name, self.config)
        self.storage = Storage(f"{self.config.storage.rstrip('/')}/{self.run_id}", self.config.storage_options)
        self._closed = threading.Event()
        self._transfer_pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix=f"{self.name}-transfer")
        self._poll_pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"{self.name}-poll")
        self._poll_future: Future[None] | None = None
        self._thread_errors: list[BaseException] = []

    def connect(self) -> None:
        """Raise `IslandError` if the island refuses this controller; record it if it is unreachable."""
        try:
            self.client.check_reachable()
        except Unreachable as error:
            self._record_unreachable(error)

    def start_polling(self) -> None:
        """Start the poll thread if it does not run; call it after all attempts of an earlier controller were added.

        The thread stops every job of this run on the island that was not added, since nothing collects its result.
        Raise the first unexpected error of this connection's threads, because its attempt would never end.
        """
        if self._poll_future is None:
            self._poll_future = self._poll_pool.submit(self._poll_loop)
            self._poll_future.add_done_callback(self._record_thread_error)
        if self._thread_errors:
            raise self._thread_errors[0]

    def close(self) -> None:
        """End this connection's threads; the island's jobs continue."""
        self._closed.set()
        self._transfer_pool.shutdown(wait=True, cancel_futures=True)
        self._poll_pool.shutdown(wait=True)

    def add(self, job: Job) -> None:
        """Send a job to the island, or reattach to it if it was sent before."""
        attempt = RemoteAttempt(job, submission_name(self.run_id, job), time.monotonic())
        self.attempts[job.stage] = attempt
        self.stored_stages.add(job.stage)
        self._start_action(attempt, self._send_job)

    def stop(self, stage: str) -> None:
        """Stop an attempt now, with the island's grace period."""
        if (attempt := self.attempts.get(stage)) and attempt.is_submitted:
            self._start_action(attempt, self._send_stop)

    # ---- upload and submission

    def _send_job(self, attempt: RemoteAttempt) -> None:
        """Upload inputs, checkpoint and job, then submit, in this order; each step is idempotent."""
        job, names = attempt.job, attempt.names
        if self.storage.get_json(names.job) is None:
            for path in {Path(path) for path in job.inputs.values()}:
                name = str(path.relative_to(self.run_root))
                if not self.storage.has_tree(name):
                    self._record_transfer(attempt, self.storage.put_tree(path, name), "out")
            if Path(job.scratch).is_dir():
                stats = self.storage.put_tree(Path(job.scratch), names.state, skip=(CACHE,))
                self._record_transfer(attempt, stats, "out")
        spec = render_job(rebase_paths(job, self.run_root, PLACEHOLDER_ROOT))
        self.storage.put_json(names.job, spec)
        self.client.check_reachable()
        self.client.submit(
            attempt.submission_id,
            self._build_command(names, hash_spec(spec)),
            wheel=self.wheel,
            resources=job.resources,
            grace_s=self.grace_s,
        )
        attempt.is_submitted, attempt.last_heartbeat = True, time.monotonic()

    def _build_command(self, names: AttemptNames, checksum: str) -> list[str]:
        options = json.dumps(self.config.storage_options)
        arguments = ["--storage", self.storage.url, "--options", options, "--job", names.job, "--digest", checksum]
        return ["python", "-P", "-m", "orchestrator.islands.worker", *arguments]

    def _send_stop(self, attempt: RemoteAttempt) -> None:
        self.client.stop(attempt.submission_id)

    def _start_action(self, attempt: RemoteAttempt, action: Callable[[RemoteAttempt], None]) -> None:
        """Run an action for an attempt on a transfer thread."""
        self._transfer_pool.submit(self._retry, attempt, action).add_done_callback(self._record_thread_error)

    def _record_thread_error(self, future: "Future[None]") -> None:
        if not future.cancelled() and (error := future.exception()) is not None:
            self._thread_errors.append(error)

    def _retry(self, attempt: RemoteAttempt, action: Callable[[RemoteAttempt], None]) -> None:
        """Run an action until the island and its storage respond or the lease expires; a refusal ends the attempt."""
        while not self._closed.is_set():
            try:
                action(attempt)
            except (Unreachable, StorageUnreachable) as error:
                if time.monotonic() - attempt.last_heartbeat > self.lease_s:
                    self._finish_attempt(attempt, attempt.make_outcome("lost", str(error), transient=True))
                    return
                self._closed.wait(POLL_INTERVAL_S)
            except (OrchestratorError, ArtifactError, OSError) as error:
                transient = isinstance(error, IslandError | StorageError | ArtifactError | OSError)
                outcome = attempt.make_outcome("failed", f"{type(error).__name__}: {error}", transient=transient)
                self._finish_attempt(attempt, outcome)
                return
            else:
                return

    # ---- polling

    def _poll_loop(self) -> None:
        while not self._closed.wait(POLL_INTERVAL_S):
            states = self._poll_jobs()
            for attempt in list(self.attempts.values()):
                if attempt.is_submitted and not attempt.is_ending:
                    self._check_attempt(attempt, states)
            if states is not None:
                self._stop_unknown_jobs(states)

    def _poll_jobs(self) -> dict[str, JobState] | None:
        """Return the island's job states by submission id; None while it does not respond."""
        try:
            states = self.client.list_states()
        except IslandError as error:
            self._record_unreachable(error)
            return None
        if self.unreachable_since is not None:
            self.record_event("recovered", island=self.name, seconds=round(time.time() - self.unreachable_since, 1))
            self.unreachable_since, self.unreachable_reason = None, ""
        return states

    def _record_unreachable(self, error: IslandError) -> None:
        if self.unreachable_since is None:
            self.unreachable_since, self.unreachable_reason = time.time(), str(error)
            self.record_event("unreachable", island=self.name, error=str(error))

    def _check_attempt(self, attempt: RemoteAttempt, states: dict[str, JobState] | None) -> None:
        """Update one attempt; collect its results if it has ended, fail it if its lease has expired."""
        now = time.monotonic()
        state = states.get(attempt.submission_id) if states is not None else None
        running = state if state is not None and not state.has_ended else None
        has_heartbeat = self._sync_attempt_folder(attempt)
        has_no_heartbeat_yet = not attempt.heartbeat_count or has_heartbeat is None
        if has_heartbeat or (running and (running.status == "PENDING" or has_no_heartbeat_yet)):
            attempt.last_heartbeat = now
        is_overdue = now - attempt.last_heartbeat > self.lease_s
        if running:
            self._forward_stop(attempt)
            if not is_overdue:
                return
        if (state and not running) or (attempt_folder(attempt.job) / "outcome.json").exists():
            attempt.is_ending = True
            self._start_action(attempt, lambda attempt: self._collect_results(attempt, state))
        elif is_overdue:
            status = state.status if state else "unknown"
            report = "is unreachable" if states is None else f"reports the attempt as {status}"
            reason = f"island {self.name} {report} and sent no heartbeat for {self.lease_s:g} s (compute.lease_s)"
            self._start_action(attempt, lambda attempt: self._fail_attempt(attempt, reason))
            attempt.is_ending = True

    def _sync_attempt_folder(self, attempt: RemoteAttempt) -> bool | None:
        """Download the attempt's folder; return whether its heartbeat changed, None if the storage is unreachable."""
        try:
            self.storage.sync_tree(attempt.names.folder, attempt_folder(attempt.job))
            heartbeat = self.storage.get_json(attempt.names.heartbeat)
            count = 0 if heartbeat is None else int(heartbeat["beats"])
        except (StorageError, OSError, ValueError, TypeError, KeyError) as error:  # the island wrote the heartbeat
            log.warning("%s: no heartbeat of %s: %s", self.name, attempt.job.stage, error)
            return None
        has_changed, attempt.heartbeat_count = count != attempt.heartbeat_count, count
        return has_changed

    def _forward_stop(self, attempt: RemoteAttempt) -> None:
        """Send a stop to the island once, as soon as one of the job's stop files exists."""
        if not attempt.stop_was_sent and any(Path(path).exists() for path in attempt.job.stop_files):
            attempt.stop_was_sent = True
            self._start_action(attempt, self._send_stop)

    def _stop_unknown_jobs(self, states: dict[str, JobState]) -> None:
        """Stop this run's jobs on the island that belong to no attempt here, such as rescheduled ones."""
        known = {attempt.submission_id for attempt in self.attempts.values()}
        for submission_id, state in states.items():
            if submission_id.startswith(f"ddm-{self.run_id}-") and submission_id not in known and not state.has_ended:
                try:
                    self.client.stop(submission_id)
                    self.record_event("reaped", island=self.name, submission=submission_id)
                except IslandError as error:
                    log.warning("%s: %s", self.name, error)

    # ---- download

    def _collect_results(self, attempt: RemoteAttempt, state: JobState | None) -> None:
        """Download the results of an ended attempt and finish it with its outcome."""
        self.storage.sync_tree(attempt.names.folder, attempt_folder(attempt.job))
        outcome = self._read_outcome(attempt)
        if outcome is None and state is not None:
            self._save_driver_log(attempt)
        outcome = outcome or _infer_outcome(attempt.job, state)
        if outcome.state == "finished":
            self._fetch_artifact(attempt)
        else:
            self._fetch_state(attempt)
        self._finish_attempt(attempt, outcome)

    def _read_outcome(self, attempt: RemoteAttempt) -> AttemptOutcome | None:
        """Return the outcome that the attempt wrote; rename a corrupt one to `.damaged` and return "lost"."""
        try:
            return read_outcome(attempt.job)
        except CorruptArtifact as error:
            path = attempt_folder(attempt.job) / "outcome.json"
            path.rename(path.with_suffix(".damaged"))
            return attempt.make_outcome("lost", str(error), transient=True)

    def _fetch_artifact(self, attempt: RemoteAttempt) -> None:
        target = Path(attempt.job.artifact)
        if not is_finished(target):
            self._record_transfer(attempt, self.storage.get_tree(attempt.names.artifact, target), "in")
        if not is_finished(target):
            raise StorageError(
                f"{attempt.names.artifact} arrived from {self.name} without its {MANIFEST}; the stage is run again"
            )

    def _fetch_state(self, attempt: RemoteAttempt) -> None:
        if self.storage.has_tree(attempt.names.state):
            stats = self.storage.get_tree(attempt.names.state, Path(attempt.job.scratch))
            self._record_transfer(attempt, stats, "in")

    def _fail_attempt(self, attempt: RemoteAttempt, reason: str) -> None:
        """Download the checkpoints if the storage responds, and finish the attempt as lost."""
        try:
            self._fetch_state(attempt)
        except StorageError as error:
            log.warning("%s: checkpoints remain in its storage: %s", self.name, error)
        self._finish_attempt(attempt, attempt.make_outcome("lost", reason, transient=True))

    def _save_driver_log(self, attempt: RemoteAttempt) -> None:
        """Write the printed output of a process that left no outcome to `driver.txt`."""
        try:
            text = self.client.fetch_log(attempt.submission_id)
        except IslandError as error:
            text = f"its output could not be fetched: {error}\n"
        (attempt_folder(attempt.job) / "driver.txt").write_text(text, encoding="utf-8")

    def _record_transfer(self, attempt: RemoteAttempt, stats: TransferStats, direction: str) -> None:
        if stats.bytes:
            facts: dict[str, Any] = {"stage": attempt.job.stage, "attempt": attempt.job.attempt, "direction": direction}
            self.record_event("moved", island=self.name, bytes=stats.bytes, files=stats.files, **facts)

    def _finish_attempt(self, attempt: RemoteAttempt, outcome: AttemptOutcome) -> None:
        if self.attempts.get(attempt.job.stage) is attempt:
            del self.attempts[attempt.job.stage]
        self.outcomes.put(outcome)


def _infer_outcome(job: Job, state: JobState | None) -> AttemptOutcome:
    """Return the outcome of an attempt that wrote none: its process, node or environment is gone."""
    outcome = AttemptOutcome(stage=job.stage, attempt=job.attempt, state="lost", transient=True)
    if state is None:
        return outcome
    if state.error_type == "RUNTIME_ENV_SETUP_FAILURE":
        return replace(outcome, state="failed", transient=False, error=f"its environment: {state.message}")
    code = "" if state.exit_code is None else f", exit code {state.exit_code}"
    return replace(outcome, error=f"{state.error_type or state.status}{code}: {state.message[:200]}")
