"""The names below an island's storage, and the plain form in which a job is sent there.

<storage>/<run id>/artifacts/<stage>[/<part>]         what stages read and publish
                   work/<stage>/attempt_<n>.job.json  what the island is asked to do
                   work/<stage>/attempt_<n>           log, progress, metrics, how it ended
                   work/<stage>/beat_<n>.json         a number that grows while the attempt lives
                   work/<stage>/state                 checkpoints
"""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ddm_core.artifacts import to_jsonable
from orchestrator.errors import IslandError
from orchestrator.run.backend import Job


@dataclass(frozen=True, slots=True)
class Names:
    """Where one attempt's things are, below the run's folder in a storage or on a node."""

    stage: str
    """The stage's folder name, `<stage>-<fingerprint>`."""
    attempt: int

    @property
    def job(self) -> str:
        """What the island is asked to do."""
        return f"work/{self.stage}/attempt_{self.attempt}.job.json"

    @property
    def folder(self) -> str:
        """What the attempt writes about itself."""
        return f"work/{self.stage}/attempt_{self.attempt}"

    @property
    def beat(self) -> str:
        """Its sign of life."""
        return f"work/{self.stage}/beat_{self.attempt}.json"

    @property
    def state(self) -> str:
        """The checkpoints of all attempts."""
        return f"work/{self.stage}/state"

    @property
    def artifact(self) -> str:
        """What the stage publishes."""
        return f"artifacts/{self.stage}"

    def next(self) -> "Names":
        """The attempt after this one, which fences it off."""
        return Names(self.stage, self.attempt + 1)


def names_of(job: Job) -> Names:
    """The names of a job's attempt."""
    return Names(Path(job.artifact).name, job.attempt)


def rebase_paths(job: Job, source: Path, target: Path) -> Job:
    """The job with every path below `source` moved to the same place below `target`."""

    def moved(path: str) -> str:
        return str(target / Path(path).relative_to(source))

    return replace(
        job,
        inputs={role: moved(path) for role, path in job.inputs.items()},
        artifact=moved(job.artifact),
        scratch=moved(job.scratch),
        stop_files=tuple(moved(path) for path in job.stop_files),
    )


def digest(spec: dict[str, Any]) -> str:
    """SHA-256 of a job in its plain form: the island refuses one that is not what the controller has submitted."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()


def job_of(spec: dict[str, Any], expected: str) -> Job:
    """The job in a plain form; raises `IslandError` if it is another one than was submitted."""
    if digest(spec) != expected:
        raise IslandError("the job in the storage is not the one that was submitted; somebody has changed the storage")
    try:
        return TypeAdapter(Job).validate_python(spec)
    except ValidationError as error:
        raise IslandError(f"the job was written by another version of this project: {error}") from error


def spec_of(job: Job) -> dict[str, Any]:
    """The plain form of a job."""
    return dict(to_jsonable(job))
