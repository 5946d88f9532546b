"""Run stages as Slurm jobs on a shared disk, through submitit; the only file that imports it.

A Slurm job is identified by its name alone, which contains run, stage and attempt. So a new controller finds every job
of its run, even one queued at the moment at which the previous controller died. The outcome of an attempt is in its
folder; Slurm is queried only for the end of a job. Nothing is pickled: docs/decisions/0007-slurm-without-pickles.md.
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
        f"compute.backend=slurm needs submitit ({missing}); run pip install 'decentralized-diffusion[slurm]'"
    ) from missing

ISLAND = "slurm"
"""Island name of Slurm attempts, which outlive their controller."""

TIMEOUT_MIN = 1440
"""Default time limit of a job, in minutes; submitit's own is five minutes."""

RESERVED_PARAMETERS = {
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
"""submitit parameters that this file sets."""


@dataclass(slots=True)
class _WatchedJob:
    """A submitted attempt."""

    job: Job
    name: str
    folder: Path
    killed: float = 0.0
    cancel_reason: bool = False
    """Whether this controller holds the attempt's claim, so the attempt can never start."""


class SlurmBackend:
    """Submits every job as a separate Slurm job; with `compute.slurm.cluster=local` jobs run on this machine."""

    def __init__(self, config: ComputeConfig, run: RunFolder) -> None:
        self._parameters = {key: value for key, value in config.slurm.items() if key != "cluster"}
        self._cluster = str(config.slurm.get("cluster", "slurm"))
        self._config, self._run_id = config, run.run_id()
        self._watched: dict[str, _WatchedJob] = {}
        self._rejected: list[AttemptOutcome] = []
        self._next_poll = 0.0
        self._check_config()
        self._executor(run.root, "check", ResourcesConfig())
        self._queue: Queue = LocalQueue() if self._cluster == "local" else SlurmQueue()

    def place(self, job: Job) -> str | None:
        """Return the island, since Slurm queues jobs itself; None if local jobs use all CPUs of this machine."""
        used = sum(entry.job.resources.cpus for entry in self._watched.values())
        has_room = self._cluster != "local" or not used or used + job.resources.cpus <= self._config.cpus_here
        return ISLAND if has_room else None

    def submit(self, job: Job) -> None:
        """Queue the job; if the submission fails and no job exists, report the attempt as failed."""
        name, folder = submission_name(self._run_id, job), attempt_folder(job)
        (folder / "slurm").mkdir()
        command = [sys.executable, "-P", "-m", "orchestrator.backends.slurm_worker", str(folder)]
        try:
            handle = self._executor(folder / "slurm", name, job.resources)._submit_command(shlex.join(command))
        except (FailedJobError, FailedSubmissionError) as error:
            if not self.attach(job):
                reason = f"Slurm rejects the job: {'; '.join(str(error).split(chr(10)))}"
                self._rejected.append(
                    AttemptOutcome(stage=job.stage, attempt=job.attempt, state="failed", error=reason, transient=True)
                )
            return
        self._queue.add(name, handle)
        self._watched[job.stage] = _WatchedJob(job, name, folder)

    def attach(self, job: Job) -> bool:
        """Watch an attempt that may be queued or running; otherwise claim it, so it never starts, and return False."""
        entry = _WatchedJob(job, submission_name(self._run_id, job), attempt_folder(job))
        is_gone = self._queue.end_reason(entry.name, entry.folder, now=True)
        if is_gone and (claim_file(entry.folder).exists() or claim(entry.folder)):
            return False
        self._watched[job.stage] = entry
        return True

    def poll(self, timeout_s: float) -> list[AttemptOutcome]:
        """Return outcomes that attempts have written, and `lost` or `preempted` for jobs that ended without one."""
        deadline = time.monotonic() + timeout_s
        while not (ended := self._collect_ended()) and self._watched and time.monotonic() < deadline:
            time.sleep(0.05)
        return ended

    def kill(self, stage: str) -> None:
        """Cancel the stage's job; one that has not started never will."""
        entry = self._watched.get(stage)
        if entry is None or time.monotonic() - entry.killed < POLL_INTERVAL_S:
            return
        entry.killed = time.monotonic()
        entry.cancel_reason = entry.cancel_reason or claim(entry.folder)
        self._queue.cancel(entry.name, entry.folder)

    def close(self) -> None:
        """Do nothing: the jobs continue in Slurm, and the next controller reattaches to them."""

    def _collect_ended(self) -> list[AttemptOutcome]:
        """Return the attempts that have ended; reads the shared disk at most once per `pause_s`."""
        ended, self._rejected = self._rejected, []
        if time.monotonic() >= self._next_poll:
            ended += [outcome for entry in self._watched.values() if (outcome := self._outcome(entry))]
            self._next_poll = time.monotonic() + self._queue.pause_s
        for outcome in ended:
            self._watched.pop(outcome.stage, None)
        return ended

    def _outcome(self, entry: _WatchedJob) -> AttemptOutcome | None:
        """Return the attempt's outcome, or None if it may run; reads its folder before and after the query of Slurm."""
        if outcome := read_outcome(entry.job):
            return outcome
        end = "cancelled before its start" if entry.cancel_reason else self._queue.end_reason(entry.name, entry.folder)
        if not end:
            return None
        if not claim_file(entry.folder).exists() and not claim(entry.folder):
            return None
        if outcome := read_outcome(entry.job):
            return outcome
        return AttemptOutcome(
            stage=entry.job.stage,
            attempt=entry.job.attempt,
            state="preempted" if end == "PREEMPTED" else "lost",
            error=f"its job ended without an outcome ({end}); its output is in {entry.folder / 'slurm'}",
            transient=True,
        )

    def _executor(self, folder: Path, name: str, resources: ResourcesConfig) -> Any:
        """Return submitit's executor with the stage's resources; raises `ConfigError` for invalid parameters."""
        parameters: dict[str, Any] = {"timeout_min": TIMEOUT_MIN} | self._parameters | {"name": name, "nodes": 1}
        parameters |= {"tasks_per_node": 1, "cpus_per_task": resources.cpus, "slurm_signal_delay_s": self._grace_s()}
        parameters |= {"slurm_srun_args": [f"--cpus-per-task={resources.cpus}"]}
        parameters |= {"slurm_additional_parameters": {"no-requeue": True}}
        if resources.gpus:
            parameters["gpus_per_node"] = int(resources.gpus)
        if resources.memory_gb:
            parameters["mem_gb"] = resources.memory_gb
        try:
            executor = submitit.AutoExecutor(folder, cluster=self._cluster)
            executor.update_parameters(**parameters)
        except (NameError, ValueError, TypeError, AssertionError, RuntimeError) as error:
            raise ConfigError(f"submitit rejects compute.slurm ({error}); correct its parameters") from error
        return executor._executor

    def _grace_s(self) -> int:
        """Return how long before its time limit a job receives the signal to save its work, in seconds."""
        return math.ceil(self._config.grace_s) + 10

    def _check_config(self) -> None:
        """Raise `ConfigError` for settings that Slurm jobs of ddm cannot have."""
        if self._cluster not in ("slurm", "local"):
            raise ConfigError(f"compute.slurm.cluster must be slurm or local; got {self._cluster!r}")
        if reserved := sorted(key for key in self._parameters if key.removeprefix("slurm_") in RESERVED_PARAMETERS):
            raise ConfigError(
                f"compute.slurm must not set {', '.join(reserved)}; use compute.stages and compute.grace_s"
            )
        for kind, resources in vars(self._config.stages).items():
            if resources.gpus != int(resources.gpus):
                raise ConfigError(
                    f"compute.stages.{kind}.gpus must be a whole number with Slurm; got {resources.gpus:g}"
                )
