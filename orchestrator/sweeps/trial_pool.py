"""Runs a limited number of trials in parallel, each in a separate controller process."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ddm_core.artifacts import ArtifactError
from orchestrator.errors import PAGE
from orchestrator.run.lease import read_holder
from orchestrator.run.run_folder import RunFolder
from orchestrator.sweeps.scores import load_score
from orchestrator.sweeps.trial import SweepTrial, TrialEnd

TICK_S = 0.1

STOPPED = 130
"""Exit code of a controller that was stopped and has saved its work."""


def build_resume_command(trial: SweepTrial) -> list[str]:
    """Return the command that runs or continues a trial."""
    return [sys.executable, "-P", "-m", "orchestrator.cli.trial_process", str(trial.run.root)]


@dataclass(slots=True)
class RunningTrial:
    """A trial that occupies a place in the pool."""

    trial: SweepTrial
    started_at: float = field(default_factory=time.monotonic)
    process: subprocess.Popen[bytes] | None = None
    """None while another controller, such as one from an earlier sweep, still runs the trial."""
    log_start: int = 0
    """Offset in `controller.log` of this process's output."""


class TrialPool:
    """Starts trials and reports how they ended.

    `limit` returns the maximum number of parallel trials, `environment` the environment of each controller. Neither is
    called before a trial has to run.
    """

    def __init__(
        self,
        limit: Callable[[], int],
        environment: Callable[[], Mapping[str, str]],
        metric: str = "",
        command: Callable[[SweepTrial], Sequence[str]] = build_resume_command,
    ) -> None:
        self.running: dict[str, RunningTrial] = {}
        self._limit, self._environment = limit, environment
        self._metric, self._command = metric, command
        self._immediate_ends: list[TrialEnd] = []
        self._stopping = False

    @property
    def has_room(self) -> bool:
        """Return whether another trial may start."""
        if not self.running:
            return not self._immediate_ends and not self._stopping
        return len(self.running) + len(self._immediate_ends) < self._limit() and not self._stopping

    @property
    def is_idle(self) -> bool:
        """Return whether nothing runs and no end is left to report."""
        return not self.running and not self._immediate_ends

    def start(self, trial: SweepTrial) -> None:
        """Start a trial; one that is finished or cannot start ends with the next `poll`."""
        if trial.config is None:
            self._immediate_ends.append(TrialEnd(trial=trial, state="failed", error=trial.error))
        elif trial.is_finished:
            self._immediate_ends.append(self._finished_end(trial, 0.0))
        else:
            self._start_controller(self.running.setdefault(trial.label, RunningTrial(trial)))

    def poll(self, timeout_s: float) -> list[TrialEnd]:
        """Return the trials that ended since the last call, after waiting up to `timeout_s` for one."""
        deadline = time.monotonic() + timeout_s
        while True:
            ended, self._immediate_ends = self._immediate_ends, []
            ended += [end for entry in list(self.running.values()) if (end := self._poll_trial(entry))]
            if ended or not self.running or time.monotonic() >= deadline:
                return ended
            time.sleep(TICK_S)

    def stop(self) -> None:
        """Send SIGTERM, so that every trial saves its work; `poll` reports them as stopped."""
        self._stopping = True
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill every trial immediately; saved work is kept."""
        self._stopping = True
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        for entry in self.running.values():
            if entry.process is not None:
                entry.process.send_signal(number)

    def _start_controller(self, entry: RunningTrial) -> None:
        """Start the trial's controller, unless another one runs it; the pool then tries again later."""
        trial = entry.trial
        try:
            if trial.config is not None and not has_controller(trial.run):
                trial.run.save_config(trial.config)
                self._spawn(entry)
        except OSError as error:
            del self.running[trial.label]
            self._immediate_ends.append(TrialEnd(trial=trial, state="failed", error=str(error)))

    def _spawn(self, entry: RunningTrial) -> None:
        trial = entry.trial
        log = trial.run.root / "controller.log"
        with log.open("ab") as output:
            entry.log_start = output.tell()
            entry.process = subprocess.Popen(
                list(self._command(trial)),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(self._environment()),
                start_new_session=True,
            )

    def _poll_trial(self, entry: RunningTrial) -> TrialEnd | None:
        """Return how a trial ended and free its place; None while it runs."""
        if entry.process is None:
            return self._poll_waiting(entry)
        code = entry.process.poll()
        if code is None:
            return None
        if entry.process.stdin is not None:
            entry.process.stdin.close()
        return self._remove(entry, code)

    def _poll_waiting(self, entry: RunningTrial) -> TrialEnd | None:
        if self._stopping:
            return self._remove(entry, STOPPED)
        if not has_controller(entry.trial.run):
            if entry.trial.is_finished:
                return self._remove(entry, 0)
            self._start_controller(entry)
        return None

    def _remove(self, entry: RunningTrial, code: int) -> TrialEnd:
        del self.running[entry.trial.label]
        seconds = time.monotonic() - entry.started_at
        if code == 0 and entry.trial.is_finished:
            return self._finished_end(entry.trial, seconds)
        if code == STOPPED or (self._stopping and code < 0):
            return TrialEnd(trial=entry.trial, state="stopped", seconds=seconds)
        error = _controller_error(entry.trial.run.root / "controller.log", entry.log_start, code)
        return TrialEnd(trial=entry.trial, state="failed", seconds=seconds, error=error)

    def _finished_end(self, trial: SweepTrial, seconds: float) -> TrialEnd:
        try:
            score = None if trial.config is None else load_score(trial.run, trial.config, self._metric)
        except ArtifactError as error:
            return TrialEnd(trial=trial, state="failed", seconds=seconds, error=str(error))
        return TrialEnd(trial=trial, state="finished", seconds=seconds, score=score)


def has_controller(run: RunFolder) -> bool:
    """Return whether a controller that may be alive holds the run's lease."""
    controller = read_holder(run)
    return controller is not None and controller.is_alive


def _controller_error(log: Path, start: int, code: int) -> str:
    """Return the last error message of a controller, or the signal that killed it."""
    if code < 0:
        return f"the controller was killed by {signal.Signals(-code).name}; see {log}"
    with log.open("rb") as file:
        file.seek(start)
        text = file.read().decode(errors="replace").strip()
    message = text[text.rfind("Error: ") :] if "Error: " in text else text.rpartition("\n")[2]
    message = message.partition(f"\nSee {PAGE}")[0]
    return message.removeprefix("Error: ").strip() or f"the controller ended with exit code {code}; see {log}"
