"""Whether a Slurm job is gone, asked of Slurm or, for jobs that submitit runs here, of this machine.

A job is *running*, *gone* or *unknown*, and unknown is not gone: while Slurm does not answer, nothing is given up.
"""

import getpass
import math
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from ddm_core.artifacts import read_json
from orchestrator.backends.slurm_worker import claim_file
from orchestrator.run.lease import idle_s, is_alive, this_process

POLL_INTERVAL_S = 10.0
"""Slurm is asked for all jobs at once, and at most so often; how an attempt ended is seen in its folder before that."""

TIMEOUT_S = 20.0
"""Longest wait for an answer of Slurm."""

QUIET_S = 30.0
"""A job that has begun and that Slurm no longer knows is gone when nothing in its folder has changed for so long."""

ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}
"""Slurm's words for jobs that will not run again; all others wait, run, or are on their way."""


class Queue(Protocol):
    """Submitted jobs by name."""

    pause_s: float
    """Least time between two looks into the attempts' folders."""

    def add(self, name: str, handle: Any) -> None:
        """Remember a job that submitit has just submitted."""

    def end_of(self, name: str, attempt: Path, *, now: bool = False) -> str:
        """What is known of a job's end, such as `TIMEOUT`; empty while it waits, runs or may run."""

    def cancel(self, name: str, attempt: Path) -> None:
        """End the job at once, or take it out of the queue."""


class SlurmQueue:
    """This user's jobs as Slurm lists them."""

    pause_s = 1.0

    def __init__(self) -> None:
        self._states: dict[str, str] | None = None
        self._looked = -POLL_INTERVAL_S

    def add(self, name: str, handle: Any) -> None:
        """Slurm knows it by its name, but the last list does not."""
        self._looked = -POLL_INTERVAL_S

    def end_of(self, name: str, attempt: Path, *, now: bool = False) -> str:
        """Slurm's word for a job that has ended, or that it is not in the queue any more."""
        if now or time.monotonic() - self._looked >= POLL_INTERVAL_S:
            self._states = self._list()
            self._looked = time.monotonic()
        if self._states is None or (self._states.get(name, "COMPLETED") not in ENDED):
            return ""
        if claim_file(attempt).exists() and idle_s(attempt) <= QUIET_S:
            return ""
        return self._states.get(name, "not in the queue")

    def cancel(self, name: str, attempt: Path) -> None:
        """SIGTERM, and SIGKILL after the time that this Slurm gives."""
        _ask("scancel", f"--user={getpass.getuser()}", f"--name={name}")

    def _list(self) -> dict[str, str] | None:
        """Every job of this user with its state; None if Slurm does not answer."""
        answer = _ask("squeue", f"--user={getpass.getuser()}", "--states=all", "--noheader", "--format=%T|%j")
        if answer is None:
            return None
        lines = sorted(line.strip().partition("|") for line in answer.splitlines())
        lines.sort(key=lambda line: line[0] not in ENDED)  # of two jobs with one name, the one that lives counts
        return {name: state for state, _, name in lines}


class LocalQueue:
    """Jobs that submitit runs on this machine."""

    pause_s = 0.05

    def __init__(self) -> None:
        self._handles: dict[str, Any] = {}

    def add(self, name: str, handle: Any) -> None:
        """Keep the job's process, which has to be waited for."""
        self._handles[name] = handle

    def end_of(self, name: str, attempt: Path, *, now: bool = False) -> str:
        """That the job's process is gone; one that an earlier controller has started is known by its claim."""
        if name in self._handles and not self._handles[name].done():
            return ""
        claimed = claim_file(attempt)
        if claimed.exists() and is_alive(read_json(claimed), idle_s(attempt)):
            return ""
        return "its process is gone"

    def cancel(self, name: str, attempt: Path) -> None:
        """Kill whoever runs the attempt; submitit's own process then ends by itself."""
        if not claim_file(attempt).exists():
            return
        claimed = read_json(claim_file(attempt))
        if claimed != this_process() and is_alive(claimed, math.inf):
            with suppress(ProcessLookupError):
                os.kill(int(claimed["pid"]), signal.SIGKILL)


def _ask(*command: str) -> str | None:
    """What one of Slurm's commands prints; None if it fails or does not end."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S).stdout  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
