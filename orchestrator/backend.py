"""Where stages run: the whole of what the runner knows about execution.

`inline` runs them here, one after the other; `ray` on the workers of a Ray cluster. Both hand a `Job` to
`worker.execute`, so a stage cannot tell the difference.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from orchestrator.config import ResourcesConfig


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How an attempt ended.

    `finished`: the artifact is published. `preempted`: stopped on request, its work is saved. `lost`: its worker
    vanished. `failed`: it raised; trying again helps only if the error is `transient`.
    """

    stage: str
    attempt: int
    state: Literal["finished", "preempted", "lost", "failed"]
    error: str = ""
    transient: bool = False
    started: float = 0.0
    """Seconds since the epoch; 0 if it never started."""


class Backend(Protocol):
    """Runs jobs, each in a process that has the CPUs it asked for."""

    def submit(self, job: Job) -> None:
        """Take a job and return at once."""

    def poll(self, timeout_s: float) -> list[Outcome]:
        """The attempts that have ended since the last call, waiting up to `timeout_s` for one."""

    def kill(self, stage: str) -> None:
        """End the running attempt of a stage at once; `poll` reports it as lost."""

    def close(self) -> None:
        """Give back whatever was started."""


def attempt_folder(job: Job) -> Path:
    """Where the attempt writes its log and its progress."""
    return Path(job.scratch) / f"attempt_{job.attempt}"
