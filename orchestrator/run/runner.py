"""Walk the graph: skip what is finished, submit what is ready, retry what was lost, go on without the optional.

The runner keeps nothing that the run folder does not: started again after any crash, it takes over the attempts that
still run and comes to the same artifacts.
"""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import TypeAdapter

from ddm_core.artifacts import read_json, to_jsonable, write_json
from orchestrator.config.compute import CONTROLLER, ComputeConfig, ResourcesConfig
from orchestrator.pipeline.stage import Stage, without
from orchestrator.run.attempts import resumed_from_step
from orchestrator.run.backend import AttemptOutcome, Backend, Job, attempt_folder
from orchestrator.run.lease import is_alive, is_here
from orchestrator.run.ready_queue import ReadyQueue
from orchestrator.run.run_folder import RunFolder

POLL_S = 0.2

LONGEST_WAIT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """How a walk ended."""

    finished: tuple[str, ...]
    """Every stage whose artifact is there."""
    submitted: int
    """Attempts started by this walk; 0 if everything was finished already."""
    failed: dict[str, str]
    """Stages that failed for good, with their errors."""
    stopped: bool
    """Whether the walk was asked to stop before its end."""


@dataclass(slots=True)
class _Running:
    """An attempt on its way."""

    stage: Stage
    job: Job
    submitted: float
    stop_requested: float | None = None
    cancel_reason: str = ""
    """Why the attempt was cut off, if it was."""
    is_final: bool = False
    """Whether the stage is to be given up, not only the attempt."""


@dataclass
class Runner:
    """One walk over one graph."""

    run: RunFolder
    graph: list[Stage]
    backend: Backend
    policy: ComputeConfig
    commit: str = ""
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
        self.frontier = ReadyQueue(self.graph)

    def run_to_end(self) -> RunResult:
        """Come as far as possible, and say how far that was."""
        self._reattach_running()
        while True:
            stopping = self.run.stop.exists()
            if not stopping:
                self.frontier.dispatch(self._start)
            self._enforce_timeouts(stopping=stopping)
            for look in self.on_tick:
                look([entry.stage for entry in self.running.values()])
            for outcome in self.backend.poll(POLL_S):
                self._handle_outcome(outcome)
            if not self.running and (stopping or self.frontier.is_exhausted()):
                break
            if not self.running and self.frontier.only_delayed():
                time.sleep(POLL_S / 4)
        return RunResult(
            finished=tuple(stage.name for stage in self.graph if stage.name in self.finished),
            submitted=self.submitted,
            failed=dict(self.failed),
            stopped=bool(self._waiting()),
        )

    def _waiting(self) -> list[Stage]:
        """Stages that could still run: neither finished nor failed, and with no failed stage before them."""
        blocked = set(self.failed)
        found = []
        for stage in self.graph:
            if any(given.stage.name in blocked for given in stage.inputs.values()):
                blocked.add(stage.name)
            elif stage.name not in self.finished | blocked:
                found.append(stage)
        return found

    def _reattach_running(self) -> None:
        """Attach to the attempts of an earlier controller that may still run."""
        for stage in self.graph:
            attempts = self.run.attempts(stage)
            if self.run.finished(stage) or not attempts or (attempts[-1] / "outcome.json").exists():
                continue
            if not (attempts[-1] / "job.json").exists():
                continue
            earlier = read_json(attempts[-1] / "job.json")
            job = replace(
                self._job(stage, int(earlier["attempt"]), str(earlier["island"])),
                resources=TypeAdapter(ResourcesConfig).validate_python(earlier["resources"]),
                commit=str(earlier["commit"]),
                preemption_count=int(earlier["preemption_count"]),
            )
            if self.backend.attach(job):
                self.running[stage.name] = _Running(stage, job, (attempts[-1] / "job.json").stat().st_mtime)
                self.run.record("attached", stage=stage.name, attempt=job.attempt, island=job.island)
                self.on_event("attached", stage, f"attempt {job.attempt} on {job.island}")
        self.frontier = ReadyQueue(self.graph, taken=self.running)

    def _start(self, stage: Stage) -> bool:
        """Start a ready stage; False if no island has room for it now."""
        if self.run.finished(stage):
            self._finish(stage)
            self.on_event("kept", stage, "")
            return True
        island = self.backend.place(self._job(stage, 0, ""))
        if island is None:
            return False
        job = self._job(stage, self._reserve_attempt(stage), island)
        write_json(attempt_folder(job) / "job.json", job)
        self.run.record(
            "submitted", stage=stage.name, fingerprint=stage.fingerprint, attempt=job.attempt, island=island
        )
        self.running[stage.name] = _Running(stage, job, time.time())
        self.submitted += 1
        self.backend.submit(job)
        return True

    def _job(self, stage: Stage, attempt: int, island: str) -> Job:
        """An attempt of the stage as plain data."""
        return Job(
            stage=stage.name,
            kind=stage.kind,
            config=to_jsonable(stage.config),
            inputs={role: str(self.run.input(given)) for role, given in stage.inputs.items()},
            input_fingerprints=stage.input_fingerprints,
            artifact=str(self.run.artifact(stage)),
            scratch=str(self.run.scratch(stage)),
            attempt=attempt,
            stop_files=(str(self.run.stop), str(self.run.attempt(stage, attempt) / "stop")),
            island=island,
            resources=stage.resources,
            commit=self.commit,
            preemption_count=self.frontier.preemption_count(stage),
        )

    def _reserve_attempt(self, stage: Stage) -> int:
        """The next attempt's number; its folder fences off every earlier attempt."""
        earlier = self.run.attempts(stage)
        number = int(earlier[-1].name.removeprefix("attempt_")) + 1 if earlier else 1
        self.run.attempt(stage, number).mkdir(parents=True)
        return number

    def _finish(self, stage: Stage) -> None:
        self.finished.add(stage.name)
        self.frontier.finish(stage.name)

    def _handle_outcome(self, outcome: AttemptOutcome) -> None:
        entry = self.running.pop(outcome.stage)
        cut_off = bool(entry.cancel_reason) and outcome.state != "finished"
        stopped = entry.stop_requested is not None and not cut_off and outcome.state == "lost"
        state = "failed" if cut_off else "preempted" if stopped else outcome.state
        error = entry.cancel_reason if cut_off else outcome.error
        written = attempt_folder(entry.job) / "outcome.json"
        if not written.exists():
            write_json(written, replace(outcome, state=state, error=error))
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
        elif state == "preempted":
            self._requeue_with_backoff(entry, self._counted(self.preemptions, entry.stage), error or "preempted")
        else:
            transient = (outcome.transient or cut_off) and not entry.is_final
            self._retry_or_fail(entry, error, transient=transient)

    def _retry_or_fail(self, entry: _Running, error: str, *, transient: bool) -> None:
        stage = entry.stage
        if self._made_progress(entry):
            self.failures[stage.name] = 0
        failures = self._counted(self.failures, stage)
        if transient and failures <= self.policy.retries:
            self._requeue_with_backoff(entry, failures, f"{error}; retry {failures} of {self.policy.retries}")
            return
        self.on_event("failed", stage, error)
        self.failed[stage.name] = error
        if stage.optional and self._has_sibling(stage):
            self._drop_optional_stage(stage, error)

    def _requeue_with_backoff(self, entry: _Running, count: int, reason: str) -> None:
        """Start the stage again after a wait that doubles each time, give or take half."""
        wait_s = min(LONGEST_WAIT_S, self.policy.backoff_s * 2 ** min(count - 1, 30)) * random.uniform(0.5, 1.5)  # noqa: S311
        island = self.policy.islands.get(entry.job.island)
        losses = entry.job.preemption_count + (island is not None and island.preemptible)
        self.frontier.requeue(entry.stage, time.time() + wait_s, losses)
        if entry.stop_requested is None or entry.cancel_reason:
            self.on_event("retry", entry.stage, f"{reason}; again in {wait_s:.1f} s")

    def _drop_optional_stage(self, lost: Stage, error: str) -> None:
        """Go on with the graph as it is without an optional stage."""
        delays, before = self.frontier.delays(), self.frontier
        self.graph = without(self.graph, lost.name)
        self.frontier = ReadyQueue(self.graph, self.finished, {*self.running, *self.failed, *delays})
        for stage in self.graph:
            if stage.name in delays:
                self.frontier.requeue(stage, delays[stage.name], before.preemption_count(stage))
        self.run.record("left_out", stage=lost.name, fingerprint=lost.fingerprint)
        self.on_event("left_out", lost, error)

    def _made_progress(self, entry: _Running) -> bool:
        """Whether an attempt began at a later checkpoint than the one before: what is lost now and then, yet goes on,
        uses up no retries; what dies at the same place does."""
        before = self.run.attempt(entry.stage, entry.job.attempt - 1)
        return resumed_from_step(attempt_folder(entry.job)) > resumed_from_step(before)

    @staticmethod
    def _counted(counts: dict[str, int], stage: Stage) -> int:
        counts[stage.name] = counts.get(stage.name, 0) + 1
        return counts[stage.name]

    def _has_sibling(self, stage: Stage) -> bool:
        """Whether another stage of the kind is left, without which nothing could be assembled."""
        return any(other.kind == stage.kind and other.name != stage.name for other in self.graph)

    def _enforce_timeouts(self, *, stopping: bool) -> None:
        """Ask attempts that are out of time to stop, and kill those that do not."""
        now = time.time()
        for entry in self.running.values():
            folder = attempt_folder(entry.job)
            if not entry.cancel_reason:
                entry.cancel_reason, entry.is_final = self._timeout_reason(entry, now)
                if entry.cancel_reason:
                    (folder / "stop").touch()
            if (stopping or entry.cancel_reason) and entry.stop_requested is None:
                entry.stop_requested = now
            if entry.stop_requested is not None and now - entry.stop_requested > self.policy.grace_s:
                self.backend.kill(entry.stage.name)

    def _timeout_reason(self, entry: _Running, now: float) -> tuple[str, bool]:
        """Why an attempt has to end, if it has to, and whether the whole stage is given up; queueing is free."""
        worker, limit, deadline = (
            attempt_folder(entry.job) / "worker.json",
            self.policy.timeout_s,
            self.policy.deadline_s,
        )
        if deadline is not None and entry.stage.optional:
            first = self.run.attempt(entry.stage, 1) / "job.json"
            if first.exists() and now - first.stat().st_mtime > deadline:
                return f"not finished within compute.deadline_s = {deadline:g} s", True
        if limit is not None and worker.is_file() and now - worker.stat().st_mtime > limit:
            return f"no end within compute.timeout_s = {limit:g} s", False
        return "", False


def kill_orphan_workers(run: RunFolder, graph: Sequence[Stage]) -> None:
    """Kill workers on this machine that a dead controller left at unfinished attempts; what they saved is kept.

    One on an island goes on, and the next controller takes it over. One on another machine is left alone: its attempt
    is fenced off by the next one's number.
    """
    for stage in graph:
        for attempt in run.attempts(stage):
            written = attempt / "worker.json"
            if not written.is_file() or (attempt / "outcome.json").is_file() or _is_elsewhere(attempt):
                continue
            worker = read_json(written)
            if is_here(worker) and worker["pid"] != os.getpid() and is_alive(worker, 0.0):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(worker["pid"]), signal.SIGKILL)


def _is_elsewhere(attempt: Path) -> bool:
    """Whether an attempt was given to a place that outlives its controller."""
    given = attempt / "job.json"
    return given.is_file() and read_json(given)["island"] not in ("", CONTROLLER)
