"""Run a graph: skip finished stages, submit ready ones, retry lost ones, continue without failed optional ones.

All state is in the run folder. After a crash, a new runner reattaches to the attempts that still run and produces
the same artifacts.
"""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ddm_core.artifacts import to_jsonable, write_record
from ddm_core.json_values import read_record
from orchestrator.config.compute import CONTROLLER, ComputeConfig
from orchestrator.pipeline.stage import Stage, remove_stage
from orchestrator.run.attempts import read_resume_step
from orchestrator.run.backend import AttemptOutcome, Backend, Job, attempt_folder
from orchestrator.run.lease import ProcessRecord, is_alive, is_on_this_host
from orchestrator.run.ready_queue import ReadyQueue
from orchestrator.run.run_folder import RunFolder, attempt_number
from orchestrator.run.worker_lock import is_worker

POLL_S = 0.2

MAX_BACKOFF_S = 60.0
"""Longest wait before a retry, before the random factor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """The result of one execution of a graph."""

    finished: tuple[str, ...]
    """Names of the stages whose artifacts exist."""
    submitted: int
    """Attempts started by this execution; 0 if everything was finished already."""
    failed: dict[str, str]
    """Stages that failed permanently, with their errors."""
    stopped: bool
    """Whether a stop request left stages unfinished."""


@dataclass(slots=True)
class _Running:
    """A submitted attempt without an outcome."""

    stage: Stage
    job: Job
    submitted: float
    stop_requested: float | None = None
    """Time of the stop request, in seconds since the epoch."""
    cancel_reason: str = ""
    """Why the attempt exceeded a limit; empty if it did not."""
    is_final: bool = False
    """Whether the stage fails permanently with this attempt."""


@dataclass
class Runner:
    """Runs one graph once."""

    run: RunFolder
    graph: list[Stage]
    backend: Backend
    policy: ComputeConfig
    commit: str = ""
    check_lease: Callable[[], None] = lambda: None
    """Raises `LeaseLost` once another controller has taken over; called before everything that this runner writes."""
    before_dispatch: Callable[[], None] = lambda: None
    """Called before stages start; it may request a stop."""
    on_event: Callable[[str, Stage, str], None] = lambda event, stage, text: None
    on_tick: Sequence[Callable[[Sequence[Stage]], None]] = ()
    running: dict[str, _Running] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    preemptions: dict[str, int] = field(default_factory=dict)
    finished: set[str] = field(default_factory=set)
    submitted: int = 0

    def __post_init__(self) -> None:
        self.run = RunFolder(self.run.root.absolute())  # a worker may have another working folder
        self.queue = ReadyQueue(self.graph)

    def run_to_end(self) -> RunResult:
        """Run stages until nothing can run any more or a stop is requested, and return the result."""
        self._reattach_running()
        while True:
            self.check_lease()
            self.before_dispatch()
            stopping = self.run.stop.exists()
            if not stopping:
                self.queue.dispatch(self._start)
            self._enforce_timeouts(stopping=stopping)
            for on_tick in self.on_tick:
                on_tick([entry.stage for entry in self.running.values()])
            for outcome in self.backend.poll(POLL_S):
                self._handle_outcome(outcome)
            if not self.running and (stopping or self.queue.is_exhausted()):
                break
            if not self.running and self.queue.has_only_delayed():
                time.sleep(POLL_S / 4)
        return RunResult(
            finished=tuple(stage.name for stage in self.graph if stage.name in self.finished),
            submitted=self.submitted,
            failed=dict(self.failed),
            stopped=bool(self._unfinished_stages()),
        )

    def _unfinished_stages(self) -> list[Stage]:
        """Return the stages that could still run: neither finished nor failed, and with no failed stage before them."""
        blocked = set(self.failed)
        unfinished = []
        for stage in self.graph:
            if any(source.stage.name in blocked for source in stage.inputs.values()):
                blocked.add(stage.name)
            elif stage.name not in self.finished | blocked:
                unfinished.append(stage)
        return unfinished

    def _reattach_running(self) -> None:
        """Attach to the attempts of an earlier controller that may still run."""
        for stage in self.graph:
            attempts = self.run.attempts(stage)
            if self.run.is_finished(stage) or not attempts or (attempts[-1] / "outcome.json").exists():
                continue
            if not (attempts[-1] / "job.json").exists():
                continue
            saved_job = read_record(Job, attempts[-1] / "job.json")
            job = replace(
                self._make_job(stage, attempt_number(attempts[-1]), saved_job.island),
                resources=saved_job.resources,
                commit=saved_job.commit,
                preemption_count=saved_job.preemption_count,
            )
            if self.backend.attach(job):
                self.running[stage.name] = _Running(stage, job, (attempts[-1] / "job.json").stat().st_mtime)
                self.run.record("attached", stage=stage.name, attempt=job.attempt, island=job.island)
                self.on_event("attached", stage, f"attempt {job.attempt} on {job.island}")
        self.queue = ReadyQueue(self.graph, taken=self.running)

    def _start(self, stage: Stage) -> bool:
        """Start a ready stage; return False if no island has room for it now."""
        if self.run.is_finished(stage):
            self._finish(stage)
            self.on_event("kept", stage, "")
            return True
        island = self.backend.place(self._make_job(stage, 0, ""))
        if island is None:
            return False
        self.check_lease()
        job = self._make_job(stage, self._reserve_attempt(stage), island)
        write_record(attempt_folder(job) / "job.json", job)
        self.run.record(
            "submitted", stage=stage.name, fingerprint=stage.fingerprint, attempt=job.attempt, island=island
        )
        self.running[stage.name] = _Running(stage, job, time.time())
        self.submitted += 1
        self.backend.submit(job)
        return True

    def _make_job(self, stage: Stage, attempt: int, island: str) -> Job:
        """Return an attempt of the stage as plain data."""
        return Job(
            stage=stage.name,
            kind=stage.kind,
            config=to_jsonable(stage.config),
            inputs={role: str(self.run.input_folder(source)) for role, source in stage.inputs.items()},
            input_fingerprints=stage.input_fingerprints,
            artifact=str(self.run.artifact(stage)),
            scratch=str(self.run.scratch(stage)),
            attempt=attempt,
            stop_files=(str(self.run.stop), str(self.run.attempt(stage, attempt) / "stop")),
            island=island,
            resources=stage.resources,
            engine=stage.engine,
            commit=self.commit,
            preemption_count=self.queue.preemption_count(stage),
        )

    def _reserve_attempt(self, stage: Stage) -> int:
        """Create the next attempt's folder, which fences off every earlier attempt, and return its number."""
        attempts = self.run.attempts(stage)
        number = attempt_number(attempts[-1]) + 1 if attempts else 1
        self.run.attempt(stage, number).mkdir(parents=True)
        return number

    def _finish(self, stage: Stage) -> None:
        self.finished.add(stage.name)
        self.queue.finish(stage.name)

    def _handle_outcome(self, outcome: AttemptOutcome) -> None:
        self.check_lease()
        entry = self.running.pop(outcome.stage)
        is_cancelled = bool(entry.cancel_reason) and outcome.state != "finished"
        is_stopped = entry.stop_requested is not None and not is_cancelled and outcome.state == "lost"
        state = "failed" if is_cancelled else "preempted" if is_stopped else outcome.state
        error = entry.cancel_reason if is_cancelled else outcome.error
        outcome_file = attempt_folder(entry.job) / "outcome.json"
        if not outcome_file.exists():
            write_record(outcome_file, replace(outcome, state=state, error=error))
        self.run.record(
            state,
            stage=outcome.stage,
            fingerprint=entry.stage.fingerprint,
            attempt=outcome.attempt,
            started=outcome.started or entry.submitted,
            error=error,
        )
        if state == "finished":
            self._finish(entry.stage)
            self.on_event("finished", entry.stage, f"in {time.time() - outcome.started:.1f} s")
            for notice in outcome.notices:
                self.on_event("notice", entry.stage, notice)
        elif state == "lost" and not outcome.uses_retry:
            self._requeue_with_backoff(entry, 1, error)
        elif state == "preempted":
            self._requeue_with_backoff(entry, self._increment(self.preemptions, entry.stage), error or "preempted")
        else:
            transient = (outcome.transient or is_cancelled) and not entry.is_final
            self._retry_or_fail(entry, error, transient=transient)

    def _retry_or_fail(self, entry: _Running, error: str, *, transient: bool) -> None:
        stage = entry.stage
        if self._made_progress(entry):
            self.failures[stage.name] = 0
        failures = self._increment(self.failures, stage)
        if transient and failures <= self.policy.retries:
            self._requeue_with_backoff(entry, failures, f"{error}; retry {failures} of {self.policy.retries}")
            return
        self.on_event("failed", stage, error)
        self.failed[stage.name] = error
        if stage.optional and self._has_sibling(stage):
            self._drop_optional_stage(stage, error)

    def _requeue_with_backoff(self, entry: _Running, count: int, reason: str) -> None:
        """Queue the stage again after a wait that doubles each time, times a random factor from 0.5 to 1.5."""
        wait_s = min(MAX_BACKOFF_S, self.policy.backoff_s * 2 ** min(count - 1, 30)) * random.uniform(0.5, 1.5)  # noqa: S311
        island = self.policy.islands.get(entry.job.island)
        losses = entry.job.preemption_count + (island is not None and island.preemptible)
        self.queue.requeue(entry.stage, time.time() + wait_s, losses)
        if entry.stop_requested is None or entry.cancel_reason:
            self.on_event("retry", entry.stage, f"{reason}; again in {wait_s:.1f} s")

    def _drop_optional_stage(self, lost: Stage, error: str) -> None:
        """Continue with the graph as it is without an optional stage."""
        delays, old_queue = self.queue.delays(), self.queue
        self.graph = remove_stage(self.graph, lost.name)
        self.queue = ReadyQueue(self.graph, self.finished, {*self.running, *self.failed, *delays})
        for stage in self.graph:
            if stage.name in delays:
                self.queue.requeue(stage, delays[stage.name], old_queue.preemption_count(stage))
        self.run.record("left_out", stage=lost.name, fingerprint=lost.fingerprint)
        self.on_event("left_out", lost, error)

    def _made_progress(self, entry: _Running) -> bool:
        """Return whether an attempt resumed from a later checkpoint than the previous one.

        An attempt that is lost after progress uses up no retries; one that fails at the same step does.
        """
        previous = self.run.attempt(entry.stage, entry.job.attempt - 1)
        return read_resume_step(attempt_folder(entry.job)) > read_resume_step(previous)

    @staticmethod
    def _increment(counts: dict[str, int], stage: Stage) -> int:
        counts[stage.name] = counts.get(stage.name, 0) + 1
        return counts[stage.name]

    def _has_sibling(self, stage: Stage) -> bool:
        """Return whether the graph has another stage of the same kind; an ensemble needs at least one."""
        return any(other.kind == stage.kind and other.name != stage.name for other in self.graph)

    def _enforce_timeouts(self, *, stopping: bool) -> None:
        """Request a stop of attempts that exceed a limit, and kill those that still run after the grace period."""
        now = time.time()
        for entry in self.running.values():
            folder = attempt_folder(entry.job)
            if not entry.cancel_reason:
                entry.cancel_reason, entry.is_final = self._timeout_reason(entry, now)
                if entry.cancel_reason:
                    (folder / "stop").touch()
            if (stopping or entry.cancel_reason) and entry.stop_requested is None:
                entry.stop_requested = now
                self.on_event("stopping", entry.stage, f"saves its work; killed after {self.policy.grace_s:g} s")
            if entry.stop_requested is not None and now - entry.stop_requested > self.policy.grace_s:
                self.backend.kill(entry.stage.name)

    def _timeout_reason(self, entry: _Running, now: float) -> tuple[str, bool]:
        """Return why an attempt has to end (empty if it may run) and whether its stage fails permanently.

        Waiting in a queue does not count towards the limits.
        """
        worker = attempt_folder(entry.job) / "worker.json"
        limit, deadline = self.policy.timeout_s, self.policy.deadline_s
        if deadline is not None and entry.stage.optional:
            first = self.run.attempt(entry.stage, 1) / "job.json"
            if first.exists() and now - first.stat().st_mtime > deadline:
                return f"not finished within compute.deadline_s = {deadline:g} s", True
        if limit is not None and worker.is_file() and now - worker.stat().st_mtime > limit:
            return f"not finished within compute.timeout_s = {limit:g} s", False
        return "", False


def kill_orphan_workers(run: RunFolder, graph: Sequence[Stage]) -> None:
    """Kill workers on this machine that a dead controller left at unfinished attempts; their checkpoints are kept.

    A worker on an island continues, and this controller reattaches to it. A worker on another machine is left alone:
    the next attempt's number fences it off. So is a process that does not hold the attempt's lock: its id in the run
    folder may be stale or forged.
    """
    for stage in graph:
        for attempt in run.attempts(stage):
            worker_file = attempt / "worker.json"
            if not worker_file.is_file() or (attempt / "outcome.json").is_file() or _outlives_controller(attempt):
                continue
            worker = read_record(ProcessRecord, worker_file)
            if not is_on_this_host(worker) or worker["pid"] == os.getpid() or not is_alive(worker, 0.0):
                continue
            if is_worker(worker["pid"], attempt):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker["pid"], signal.SIGKILL)


def _outlives_controller(attempt: Path) -> bool:
    """Return whether an attempt runs in a place that outlives its controller."""
    job_file = attempt / "job.json"
    return job_file.is_file() and read_record(Job, job_file).island not in ("", CONTROLLER)
