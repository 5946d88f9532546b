"""Where stages run: the whole of what the runner knows about execution.

`inline` runs them here, one after the other; `ray` on the workers of a Ray cluster; `islands` on Ray clusters of their
own; `slurm` as Slurm jobs. All of them hand a `Job` to `worker.execute`, so a stage cannot tell the difference.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import TypeAdapter, ValidationError

from ddm_core.artifacts import CorruptArtifact, read_json
from orchestrator.config.compute import ResourcesConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One attempt of one stage, as plain data that can cross to another process or machine."""

    stage: str
    kind: str
    config: dict[str, Any]
    inputs: dict[str, str]
    """Folder of every input, by role."""
    input_fingerprints: dict[str, str]
    artifact: str
    """The folder to publish."""
    scratch: str
    attempt: int
    stop_files: tuple[str, ...]
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    commit: str = ""
    island: str = ""
    """Where it runs; empty for backends that are one place."""
    preemption_count: int = 0
    """How many of its attempts were lost on preemptible islands."""


State = Literal["finished", "preempted", "lost", "failed"]

EXIT_CODES: dict[State, int] = {"finished": 0, "preempted": 75, "lost": 1, "failed": 1}
"""Of a process that runs one attempt; the runner reads `outcome.json` instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptOutcome:
    """How an attempt ended.

    `finished`: the artifact is published. `preempted`: asked to stop, its work is saved. `lost`: its worker
    vanished. `failed`: it raised; trying again helps only if the error is `transient`.
    """

    stage: str
    attempt: int
    state: State
    error: str = ""
    transient: bool = False
    started: float = 0.0
    """Seconds since the epoch; 0 if it never started."""
    ended: float = 0.0
    """The same for its end; 0 if its worker did not live to say so."""


class Backend(Protocol):
    """Runs jobs, each in a process that has the CPUs it asked for."""

    def place(self, job: Job) -> str | None:
        """The island that should run the job now, empty for a backend that is one place; None: none has room."""

    def submit(self, job: Job) -> None:
        """Take a job and return at once."""

    def attach(self, job: Job) -> bool:
        """Take over an attempt that an earlier controller submitted; False if it cannot have outlived that."""

    def poll(self, timeout_s: float) -> list[AttemptOutcome]:
        """The attempts that have ended since the last call, waiting up to `timeout_s` for one."""

    def kill(self, stage: str) -> None:
        """End the running attempt of a stage at once; `poll` reports it as lost."""

    def close(self) -> None:
        """Give back whatever was started."""


def submission_name(run_id: str, job: Job) -> str:
    """What an attempt is called wherever it is submitted; no other attempt of any run has that name."""
    return f"ddm-{run_id}-{Path(job.artifact).name}-a{job.attempt}"


def read_outcome(job: Job) -> AttemptOutcome | None:
    """What the attempt says of its end; None if it has not, or did not live to.

    Raises `CorruptArtifact` for what no worker writes.
    """
    written = attempt_folder(job) / "outcome.json"
    if not written.is_file():
        return None
    try:
        return TypeAdapter(AttemptOutcome).validate_python(read_json(written))
    except ValidationError as error:
        raise CorruptArtifact(f"{written} does not say how an attempt ended ({error}); delete it") from error


def attempt_folder(job: Job) -> Path:
    """Where the attempt writes its log and its progress."""
    return Path(job.scratch).parent / f"attempt_{job.attempt}"
