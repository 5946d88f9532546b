"""Stages as Slurm jobs on a shared disk, through submitit; the one file that imports it.

A Slurm job is found by its name alone, which says run, stage and attempt. So a controller finds every job of its run
again, also one that was queued in the instant in which an earlier controller died. How an attempt ended stands in its
folder; Slurm is asked only whether a job is gone. Nothing is pickled: docs/decisions/0007-slurm-without-pickles.md.
"""

import math
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.backends.slurm_queue import POLL_INTERVAL_S, LocalQueue, Queue, SlurmQueue
from orchestrator.backends.slurm_worker import claim, claim_file
from orchestrator.config.compute import ComputeConfig, ResourcesConfig
from orchestrator.errors import ConfigError
from orchestrator.run.backend import AttemptOutcome, Job, attempt_folder, read_outcome, submission_name
from orchestrator.run.run_folder import RunFolder

try:
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError
except ImportError as missing:
    raise ConfigError(
        f"compute.backend=slurm needs submitit ({missing}): pip install 'decentralized-diffusion[slurm]'"
    ) from missing

ISLAND = "slurm"
"""What attempts say of where they run; they outlive their controller."""

TIMEOUT_MIN = 1440
"""Time limit of a job unless `compute.slurm` says otherwise; submitit's own is five minutes."""

OURS = {
    "name",
    "job_name",
    "nodes",
    "tasks_per_node",
    "ntasks_per_node",
    "cpus_per_task",
    "signal_delay_s",
    "srun_args",
    "additional_parameters",
}
"""What this file sets itself."""


@dataclass(slots=True)
class _Watched:
    """A submitted attempt."""

    job: Job
    name: str
    folder: Path
    killed: float = 0.0
    cancel_reason: bool = False
    """Whether we hold the claim ourselves, so that it can never begin."""


class SlurmBackend:
    """Submits every job as a Slurm job of its own; `compute.slurm.cluster=local` runs them on this machine instead."""

    def __init__(self, config: ComputeConfig, run: RunFolder) -> None:
        self._given = {key: value for key, value in config.slurm.items() if key != "cluster"}
        self._cluster = str(config.slurm.get("cluster", "slurm"))
        self._config, self._run_id = config, run.run_id()
        self._watched: dict[str, _Watched] = {}
        self._refused: list[AttemptOutcome] = []
        self._next_look = 0.0
        self._refuse_impossible()
        self._executor(run.root, "check", ResourcesConfig())
        self._queue: Queue = LocalQueue() if self._cluster == "local" else SlurmQueue()

    def place(self, job: Job) -> str | None:
        """Slurm has a queue of its own; here, jobs wait for this machine's CPUs."""
        used = sum(entry.job.resources.cpus for entry in self._watched.values())
        has_room = self._cluster != "local" or not used or used + job.resources.cpus <= self._config.cpus_here
        return ISLAND if has_room else None

    def submit(self, job: Job) -> None:
        """Queue the job; if that fails and Slurm does not know of it, it is given up and reported as failed."""
        name, folder = submission_name(self._run_id, job), attempt_folder(job)
        (folder / "slurm").mkdir()
        command = [sys.executable, "-m", "orchestrator.backends.slurm_worker", str(folder)]
        try:
            handle = self._executor(folder / "slurm", name, job.resources)._submit_command(shlex.join(command))
        except (FailedJobError, FailedSubmissionError) as error:
            if not self.attach(job):
                reason = f"Slurm refuses the job: {'; '.join(str(error).split(chr(10)))}"
                self._refused.append(
                    AttemptOutcome(stage=job.stage, attempt=job.attempt, state="failed", error=reason, transient=True)
                )
            return
        self._queue.add(name, handle)
        self._watched[job.stage] = _Watched(job, name, folder)

    def attach(self, job: Job) -> bool:
        """Watch an attempt that may be queued or running; False if it is neither, and then it never will be."""
        entry = _Watched(job, submission_name(self._run_id, job), attempt_folder(job))
        is_gone = self._queue.end_of(entry.name, entry.folder, now=True)
        if is_gone and (claim_file(entry.folder).exists() or claim(entry.folder)):
            return False
        self._watched[job.stage] = entry
        return True

    def poll(self, timeout_s: float) -> list[AttemptOutcome]:
        """Outcomes that attempts have written, and those of attempts that are gone without a word."""
        deadline = time.monotonic() + timeout_s
        while not (ended := self._ended()) and self._watched and time.monotonic() < deadline:
            time.sleep(0.05)
        return ended

    def kill(self, stage: str) -> None:
        """Cancel the stage's job; one that has not begun never will."""
        entry = self._watched.get(stage)
        if entry is None or time.monotonic() - entry.killed < POLL_INTERVAL_S:
            return
        entry.killed = time.monotonic()
        entry.cancel_reason = entry.cancel_reason or claim(entry.folder)
        self._queue.cancel(entry.name, entry.folder)

    def close(self) -> None:
        """Leave the jobs to Slurm: they go on, and the next controller takes them over."""

    def _ended(self) -> list[AttemptOutcome]:
        """The attempts that have ended, looked for as often as a shared disk should be asked."""
        ended, self._refused = self._refused, []
        if time.monotonic() >= self._next_look:
            ended += [outcome for entry in self._watched.values() if (outcome := self._outcome(entry))]
            self._next_look = time.monotonic() + self._queue.pause_s
        for outcome in ended:
            self._watched.pop(outcome.stage, None)
        return ended

    def _outcome(self, entry: _Watched) -> AttemptOutcome | None:
        """How the attempt ended, if it has; looked for in its folder before and after Slurm is asked."""
        if written := read_outcome(entry.job):
            return written
        end = "cancelled before it began" if entry.cancel_reason else self._queue.end_of(entry.name, entry.folder)
        if not end:
            return None
        if not claim_file(entry.folder).exists() and not claim(entry.folder):
            return None
        if written := read_outcome(entry.job):
            return written
        return AttemptOutcome(
            stage=entry.job.stage,
            attempt=entry.job.attempt,
            state="preempted" if end == "PREEMPTED" else "lost",
            error=f"its job is gone ({end}); what it printed is in {entry.folder / 'slurm'}",
            transient=True,
        )

    def _executor(self, folder: Path, name: str, asked: ResourcesConfig) -> Any:
        """submitit's executor, set to what the stage asks for; raises `ConfigError` for what it does not accept."""
        parameters: dict[str, Any] = {"timeout_min": TIMEOUT_MIN} | self._given | {"name": name, "nodes": 1}
        parameters |= {"tasks_per_node": 1, "cpus_per_task": asked.cpus, "slurm_signal_delay_s": self._grace_s()}
        parameters |= {"slurm_srun_args": [f"--cpus-per-task={asked.cpus}"]}
        parameters |= {"slurm_additional_parameters": {"no-requeue": True}}
        if asked.gpus:
            parameters["gpus_per_node"] = int(asked.gpus)
        if asked.memory_gb:
            parameters["mem_gb"] = asked.memory_gb
        try:
            executor = submitit.AutoExecutor(folder, cluster=self._cluster)
            executor.update_parameters(**parameters)
        except (NameError, ValueError, TypeError, AssertionError, RuntimeError) as error:
            raise ConfigError(f"compute.slurm is refused by submitit: {error}") from error
        return executor._executor

    def _grace_s(self) -> int:
        """How long before its time limit a job is told to save its work."""
        return math.ceil(self._config.grace_s) + 10

    def _refuse_impossible(self) -> None:
        """Raise `ConfigError` for what a Slurm job of ours cannot be."""
        if self._cluster not in ("slurm", "local"):
            raise ConfigError(f"compute.slurm.cluster is slurm or local; given: {self._cluster!r}")
        if mine := sorted(key for key in self._given if key.removeprefix("slurm_") in OURS):
            raise ConfigError(f"compute.slurm may not set {', '.join(mine)}: compute.stages and compute.grace_s do")
        for kind, asked in vars(self._config.stages).items():
            if asked.gpus != int(asked.gpus):
                raise ConfigError(f"compute.stages.{kind}.gpus is {asked.gpus:g}: Slurm gives whole GPUs")
