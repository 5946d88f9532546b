"""Find out whether a Slurm job has ended, from Slurm or, for jobs that submitit runs here, from this machine.

A job is *running*, *ended* or *unknown*, and unknown is not ended: while Slurm does not respond, no job is lost.
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

from ddm_core.json_values import read_record
from orchestrator.backends.slurm_worker import claim_file
from orchestrator.run.lease import ProcessRecord, is_alive, seconds_since_change, this_process
from orchestrator.run.worker_lock import is_worker

POLL_INTERVAL_S = 10.0
"""Least time between two queries of Slurm, each for all jobs; an attempt's outcome is visible earlier in its folder."""

TIMEOUT_S = 20.0
"""Longest wait for a response of Slurm."""

IDLE_LIMIT_S = 30.0
"""A started job that Slurm no longer lists has ended if its folder has not changed for this time."""

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
"""Slurm's states of jobs that will not run again; in all other states a job waits, runs or starts."""


class Queue(Protocol):
    """Submitted jobs by name."""

    pause_s: float
    """Least time between two reads of the attempts' folders."""

    def add(self, name: str, handle: Any) -> None:
        """Register a job that submitit has submitted."""

    def end_reason(self, name: str, attempt: Path, *, now: bool = False) -> str:
        """Return why a job ended, such as `TIMEOUT`; empty while it waits, runs or may run."""

    def cancel(self, name: str, attempt: Path) -> None:
        """End the job at once, or remove it from the queue."""


class SlurmQueue:
    """This user's jobs, listed by Slurm."""

    pause_s = 1.0

    def __init__(self) -> None:
        self._states: dict[str, str] | None = None
        self._listed_at = -POLL_INTERVAL_S

    def add(self, name: str, handle: Any) -> None:
        """Invalidate the last list of jobs, which does not contain this one."""
        self._listed_at = -POLL_INTERVAL_S

    def end_reason(self, name: str, attempt: Path, *, now: bool = False) -> str:
        """Return Slurm's state of an ended job, or that it is not in the queue; empty otherwise."""
        if now or time.monotonic() - self._listed_at >= POLL_INTERVAL_S:
            self._states = self._list()
            self._listed_at = time.monotonic()
        if self._states is None or (self._states.get(name, "COMPLETED") not in ENDED):
            return ""
        if claim_file(attempt).exists() and seconds_since_change(attempt) <= IDLE_LIMIT_S:
            return ""
        return self._states.get(name, "not in the queue")

    def cancel(self, name: str, attempt: Path) -> None:
        """Send SIGTERM, and SIGKILL after Slurm's configured wait."""
        _run_command("scancel", f"--user={getpass.getuser()}", f"--name={name}")

    def _list(self) -> dict[str, str] | None:
        """Return every job of this user with its state; None if Slurm does not respond."""
        output = _run_command("squeue", f"--user={getpass.getuser()}", "--states=all", "--noheader", "--format=%T|%j")
        if output is None:
            return None
        lines = sorted(line.strip().partition("|") for line in output.splitlines())
        lines.sort(key=lambda line: line[0] not in ENDED)  # if two jobs share a name, the active one counts
        return {name: state for state, _, name in lines}


class LocalQueue:
    """Jobs that submitit runs on this machine."""

    pause_s = 0.05

    def __init__(self) -> None:
        self._handles: dict[str, Any] = {}

    def add(self, name: str, handle: Any) -> None:
        """Keep the job's handle, whose process has to be waited for."""
        self._handles[name] = handle

    def end_reason(self, name: str, attempt: Path, *, now: bool = False) -> str:
        """Return whether the job's process has ended; a process of an earlier controller is identified by its claim."""
        if name in self._handles and not self._handles[name].done():
            return ""
        claim = claim_file(attempt)
        if claim.exists() and is_alive(read_record(ProcessRecord, claim), seconds_since_change(attempt)):
            return ""
        return "its process has ended"

    def cancel(self, name: str, attempt: Path) -> None:
        """Kill the process that runs the attempt; submitit's own process then ends by itself."""
        if not claim_file(attempt).exists():
            return
        claimant = read_record(ProcessRecord, claim_file(attempt))
        if claimant != this_process() and is_alive(claimant, math.inf) and is_worker(claimant["pid"], attempt):
            with suppress(ProcessLookupError):
                os.kill(claimant["pid"], signal.SIGKILL)


def _run_command(*command: str) -> str | None:
    """Return the output of a Slurm command; None if it fails or times out."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S).stdout  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
