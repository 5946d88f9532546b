"""Walk the graph: skip what is finished, submit what is ready, retry what was lost, go on without the optional.

The runner keeps nothing that the run folder does not: started again after any crash, it comes to the same artifacts.
"""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from artifacts import plain, read_json
from orchestrator.backend import Backend, Job, Outcome
from orchestrator.config import ComputeConfig
from orchestrator.lease import is_alive
from orchestrator.run_folder import RunFolder
from orchestrator.stage import Stage, without

POLL_S = 0.2


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
    attempt: int
    submitted: float
    asked_to_stop: float | None = None
    timed_out: bool = False


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
    not_before: dict[str, float] = field(default_factory=dict)
    finished: set[str] = field(default_factory=set)
    submitted: int = 0

    def walk(self) -> RunResult:
        """Come as far as possible, and say how far that was."""
        while True:
            stopping = self.run.stop.exists()
            if not stopping:
                self._submit_ready()
            self._watch_clocks(stopping=stopping)
            for look in self.on_tick:
                look([entry.stage for entry in self.running.values()])
            for outcome in self.backend.poll(POLL_S):
                self._settle(outcome)
            if not self.running and (stopping or not self._waiting()):
                break
            if not self.running and any(time.time() < moment for moment in self.not_before.values()):
                time.sleep(POLL_S / 4)
        return RunResult(
            finished=tuple(stage.name for stage in self.graph if stage.name in self.finished),
            submitted=self.submitted,
            failed=dict(self.failed),
            stopped=bool(self._waiting()),
        )

    def _waiting(self) -> list[Stage]:
        """Stages that could still run: neither finished, running nor failed, and with no failed stage before them."""
        blocked = set(self.failed)
        found = []
        for stage in self.graph:
            if any(given.stage.name in blocked for given in stage.inputs.values()):
                blocked.add(stage.name)
            elif stage.name not in self.finished | self.running.keys() | blocked:
                found.append(stage)
        return found

    def _submit_ready(self) -> None:
        for stage in self._waiting():
            if any(given.stage.name not in self.finished for given in stage.inputs.values()):
                continue
            if self.run.finished(stage):
                self.finished.add(stage.name)
                self.on_event("kept", stage, "")
            elif time.time() >= self.not_before.get(stage.name, 0.0):
                self._submit(stage)

    def _submit(self, stage: Stage) -> None:
        attempt = self._reserve_attempt(stage)
        run = RunFolder(self.run.root.absolute())  # a worker may have another working folder
        self.run.record("submitted", stage=stage.name, fingerprint=stage.fingerprint, attempt=attempt)
        self.running[stage.name] = _Running(stage, attempt, time.time())
        self.submitted += 1
        self.backend.submit(
            Job(
                stage=stage.name,
                kind=stage.kind,
                config=plain(stage.config),
                inputs={role: str(run.input(given)) for role, given in stage.inputs.items()},
                input_fingerprints=stage.input_fingerprints,
                artifact=str(run.artifact(stage)),
                scratch=str(run.scratch(stage)),
                attempt=attempt,
                stop_files=(str(run.stop), str(run.attempt(stage, attempt) / "stop")),
                resources=stage.resources,
                commit=self.commit,
            )
        )

    def _reserve_attempt(self, stage: Stage) -> int:
        """The next attempt's number; its folder fences off every earlier attempt."""
        earlier = self.run.attempts(stage)
        number = int(earlier[-1].name.removeprefix("attempt_")) + 1 if earlier else 1
        self.run.attempt(stage, number).mkdir(parents=True)
        return number

    def _settle(self, outcome: Outcome) -> None:
        entry = self.running.pop(outcome.stage)
        timed_out = entry.timed_out and outcome.state != "finished"
        stopped = entry.asked_to_stop is not None and not timed_out and outcome.state == "lost"
        state = "failed" if timed_out else "preempted" if stopped else outcome.state
        error = f"no end within compute.timeout_s = {self.policy.timeout_s:g} s" if timed_out else outcome.error
        self.run.record(
            state,
            stage=outcome.stage,
            fingerprint=entry.stage.fingerprint,
            attempt=outcome.attempt,
            started=outcome.started or entry.submitted,
            error=error,
        )
        if state == "finished":
            self.finished.add(outcome.stage)
            self.on_event("finished", entry.stage, f"in {time.time() - outcome.started:.1f} s")
        elif state != "preempted":
            self._retry_or_give_up(entry.stage, error, transient=outcome.transient or timed_out)

    def _retry_or_give_up(self, stage: Stage, error: str, *, transient: bool) -> None:
        failures = self.failures[stage.name] = self.failures.get(stage.name, 0) + 1
        if transient and failures <= self.policy.retries:
            wait_s = min(60.0, self.policy.backoff_s * 2 ** (failures - 1))
            self.not_before[stage.name] = time.time() + wait_s
            self.on_event("retry", stage, f"{error}; retry {failures} of {self.policy.retries} in {wait_s:g} s")
            return
        self.on_event("failed", stage, error)
        if stage.optional and self._has_sibling(stage):
            self.graph = without(self.graph, stage.name)
            self.run.record("left_out", stage=stage.name, fingerprint=stage.fingerprint)
            self.on_event("left_out", stage, error)
        self.failed[stage.name] = error

    def _has_sibling(self, stage: Stage) -> bool:
        """Whether another stage of the kind is left, without which nothing could be assembled."""
        return any(other.kind == stage.kind and other.name != stage.name for other in self.graph)

    def _watch_clocks(self, *, stopping: bool) -> None:
        """Ask attempts that are out of time to stop, and kill those that do not."""
        now = time.time()
        for entry in self.running.values():
            folder = self.run.attempt(entry.stage, entry.attempt)
            if not entry.timed_out and self._is_out_of_time(folder / "worker.json", now):
                entry.timed_out = True
                (folder / "stop").touch()
            if (stopping or entry.timed_out) and entry.asked_to_stop is None:
                entry.asked_to_stop = now
            if entry.asked_to_stop is not None and now - entry.asked_to_stop > self.policy.grace_s:
                self.backend.kill(entry.stage.name)

    def _is_out_of_time(self, worker: Path, now: float) -> bool:
        """Whether the attempt's worker, which writes that file first of all, has had `timeout_s`; queueing is free."""
        limit = self.policy.timeout_s
        return limit is not None and worker.is_file() and now - worker.stat().st_mtime > limit


def end_orphans(run: RunFolder, graph: Sequence[Stage]) -> None:
    """Kill workers on this machine that a dead controller left at unfinished attempts; what they saved is kept.

    One on another machine is left alone: its attempt is fenced off by the next one's number.
    """
    for stage in graph:
        for attempt in run.attempts(stage):
            written = attempt / "worker.json"
            if not written.is_file() or (attempt / "outcome.json").is_file():
                continue
            worker = read_json(written)
            if worker["host"] == socket.gethostname() and worker["pid"] != os.getpid() and is_alive(worker, 0.0):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(worker["pid"]), signal.SIGKILL)
