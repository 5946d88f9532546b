"""The interface between the runner and the places where stages run.

`inline` runs stages in this process, one after the other; `ray` on the workers of a Ray cluster; `islands` on Ray
clusters of their own; `slurm` as Slurm jobs. All of them pass a `Job` to `worker.execute`, so stages are independent
of the backend.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field, FiniteFloat

from ddm_core.json_values import read_record
from orchestrator.config.compute import ResourcesConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One attempt of one stage, as plain data for another process or machine."""

    stage: str
    kind: str
    config: dict[str, Any]
    inputs: dict[str, str]
    """Folder of every input by role."""
    input_fingerprints: dict[str, str]
    artifact: str
    """The folder to publish."""
    scratch: str
    attempt: int
    stop_files: tuple[str, ...]
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    engine: str = "local"
    """Where it computes: in its own process, or on `resources.workers` processes of Ray Data."""
    commit: str = ""
    island: str = ""
    """Where it runs; empty for backends with only one place."""
    preemption_count: int = 0
    """How many of its attempts were lost on preemptible islands."""


State = Literal["finished", "preempted", "lost", "failed"]

EXIT_CODES: dict[State, int] = {"finished": 0, "preempted": 75, "lost": 1, "failed": 1}
"""Exit codes of a process that runs one attempt; the runner reads `outcome.json` instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptOutcome:
    """The result of an attempt.

    `finished`: the artifact is published. `preempted`: it stopped on request and saved its work. `lost`: its worker
    vanished. `failed`: it raised an error; a retry helps only if the error is `transient`.
    """

    stage: str
    attempt: int
    state: State
    error: str = ""
    transient: bool = False
    started: FiniteFloat = 0.0
    """Seconds since the epoch; 0 if it never started."""
    ended: FiniteFloat = 0.0
    """Seconds since the epoch; 0 if its worker died before it wrote its end."""
    notices: tuple[str, ...] = ()
    """Sentences for the person who started the run."""
    cpu_s: Annotated[FiniteFloat, Field(ge=0)] = 0.0
    """CPU seconds that its worker and the worker's ended children used; 0 is unknown."""
    uses_retry: bool = True
    """Whether another attempt uses up a retry of the stage; not if what it ran on was started again."""


class Backend(Protocol):
    """Runs jobs, each in a process with the CPUs that the job requires."""

    def place(self, job: Job) -> str | None:
        """Return the island that should run the job now (empty: the backend has one place), or None without room."""

    def submit(self, job: Job) -> None:
        """Start or queue a job and return at once."""

    def attach(self, job: Job) -> bool:
        """Reattach to an attempt of an earlier controller; return False if it cannot run any more."""

    def poll(self, timeout_s: float) -> list[AttemptOutcome]:
        """Return the attempts that ended since the last call, after waiting up to `timeout_s` for one."""

    def kill(self, stage: str) -> None:
        """Kill the running attempt of a stage; `poll` reports it as lost."""

    def close(self) -> None:
        """Release all resources that the backend has started."""


def submission_name(run_id: str, job: Job) -> str:
    """Return the attempt's name on clusters and islands, unique among all attempts of all runs."""
    return f"ddm-{run_id}-{Path(job.artifact).name}-a{job.attempt}"


def read_outcome(job: Job) -> AttemptOutcome | None:
    """Return the attempt's written outcome; None if it runs, or died before it wrote one.

    Raises `CorruptArtifact` for a file that is not an outcome.
    """
    path = attempt_folder(job) / "outcome.json"
    return read_record(AttemptOutcome, path) if path.is_file() else None


def attempt_folder(job: Job) -> Path:
    """Return the folder of the attempt's log and progress."""
    return Path(job.scratch).parent / f"attempt_{job.attempt}"
