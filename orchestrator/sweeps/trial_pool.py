"""Trials at once, each a controller process of its own, at most so many of them."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ddm_core.artifacts import ArtifactError
from orchestrator.run.lease import holder
from orchestrator.run.run_folder import RunFolder
from orchestrator.sweeps.scores import score_of
from orchestrator.sweeps.trial import SweepTrial, TrialEnd

TICK_S = 0.1

STOPPED = 130
"""Exit code of a controller that was asked to stop and has saved its work."""


def resume_command(trial: SweepTrial) -> list[str]:
    """The command that goes on with a trial until it is finished."""
    return [sys.executable, "-m", "orchestrator.cli.trial_process", str(trial.run.root)]


@dataclass(slots=True)
class RunningTrial:
    """A trial that has a place in the pool."""

    trial: SweepTrial
    began: float = field(default_factory=time.monotonic)
    process: subprocess.Popen[bytes] | None = None
    """None while another controller, such as one that outlived an earlier sweep, still walks the run."""
    log_start: int = 0
    """Where in `controller.log` its own part begins."""


class TrialPool:
    """Starts trials, and says how they ended.

    `limit` is how many at once and `environment` what each is given; neither is asked for before a trial has to run.
    """

    def __init__(
        self,
        limit: Callable[[], int],
        environment: Callable[[], Mapping[str, str]],
        metric: str = "",
        command: Callable[[SweepTrial], Sequence[str]] = resume_command,
    ) -> None:
        self.members: dict[str, RunningTrial] = {}
        self._limit, self._environment = limit, environment
        self._metric, self._command = metric, command
        self._at_once: list[TrialEnd] = []
        self._stopping = False

    @property
    def has_room(self) -> bool:
        """Whether one more may be started."""
        if not self.members:
            return not self._at_once and not self._stopping
        return len(self.members) + len(self._at_once) < self._limit() and not self._stopping

    @property
    def is_idle(self) -> bool:
        """Whether nothing is running and there is nothing left to say."""
        return not self.members and not self._at_once

    def start(self, trial: SweepTrial) -> None:
        """Give the trial a place; one that is finished, or that cannot begin, ends with the next `poll`."""
        if trial.config is None:
            self._at_once.append(TrialEnd(trial=trial, state="failed", error=trial.error))
        elif trial.is_finished:
            self._at_once.append(self._finished(trial, 0.0))
        else:
            self._begin(self.members.setdefault(trial.label, RunningTrial(trial)))

    def poll(self, timeout_s: float) -> list[TrialEnd]:
        """The trials that have ended since the last call, waiting up to `timeout_s` for one."""
        deadline = time.monotonic() + timeout_s
        while True:
            ended, self._at_once = self._at_once, []
            ended += [end for member in list(self.members.values()) if (end := self._poll_trial(member))]
            if ended or not self.members or time.monotonic() >= deadline:
                return ended
            time.sleep(TICK_S)

    def stop(self) -> None:
        """Ask every trial to save its work; `poll` reports them as stopped."""
        self._stopping = True
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End every trial at once; what was saved is kept."""
        self._stopping = True
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        for member in self.members.values():
            if member.process is not None:
                member.process.send_signal(number)

    def _begin(self, member: RunningTrial) -> None:
        """Start the controller unless another one is at it; then the pool looks again later."""
        trial = member.trial
        try:
            if trial.config is not None and not has_controller(trial.run):
                trial.run.save_config(trial.config)
                self._spawn(member)
        except OSError as error:
            del self.members[trial.label]
            self._at_once.append(TrialEnd(trial=trial, state="failed", error=str(error)))

    def _spawn(self, member: RunningTrial) -> None:
        trial = member.trial
        log = trial.run.root / "controller.log"
        with log.open("ab") as output:
            member.log_start = output.tell()
            member.process = subprocess.Popen(
                list(self._command(trial)),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(self._environment()),
                start_new_session=True,
            )

    def _poll_trial(self, member: RunningTrial) -> TrialEnd | None:
        """How a member ended, which frees its place; None as long as it goes on."""
        if member.process is None:
            return self._look_at_waiting(member)
        code = member.process.poll()
        if code is None:
            return None
        if member.process.stdin is not None:
            member.process.stdin.close()
        return self._leave(member, code)

    def _look_at_waiting(self, member: RunningTrial) -> TrialEnd | None:
        if self._stopping:
            return self._leave(member, STOPPED)
        if not has_controller(member.trial.run):
            if member.trial.is_finished:
                return self._leave(member, 0)
            self._begin(member)
        return None

    def _leave(self, member: RunningTrial, code: int) -> TrialEnd:
        del self.members[member.trial.label]
        seconds = time.monotonic() - member.began
        if code == 0 and member.trial.is_finished:
            return self._finished(member.trial, seconds)
        if code == STOPPED or (self._stopping and code < 0):
            return TrialEnd(trial=member.trial, state="stopped", seconds=seconds)
        error = _last_words(member.trial.run.root / "controller.log", member.log_start, code)
        return TrialEnd(trial=member.trial, state="failed", seconds=seconds, error=error)

    def _finished(self, trial: SweepTrial, seconds: float) -> TrialEnd:
        try:
            score = None if trial.config is None else score_of(trial.run, trial.config, self._metric)
        except ArtifactError as error:
            return TrialEnd(trial=trial, state="failed", seconds=seconds, error=str(error))
        return TrialEnd(trial=trial, state="finished", seconds=seconds, score=score)


def has_controller(run: RunFolder) -> bool:
    """Whether a controller that may be alive holds the run."""
    other = holder(run)
    return other is not None and other.is_alive


def _last_words(log: Path, start: int, code: int) -> str:
    """What a controller that did not finish said last, or which signal ended it."""
    if code < 0:
        return f"its controller was killed by {signal.Signals(-code).name}; its log is {log}"
    with log.open("rb") as file:
        file.seek(start)
        text = file.read().decode(errors="replace").strip()
    words = text[text.rfind("Error: ") :] if "Error: " in text else text.rpartition("\n")[2]
    return words.removeprefix("Error: ").strip() or f"its controller ended with exit code {code}; its log is {log}"
