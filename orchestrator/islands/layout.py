"""Names below an island's storage, and the JSON form of a job.

<storage>/<run id>/artifacts/<stage>[/<part>]         inputs and artifacts of stages
                   work/<stage>/attempt_<n>.job.json  the job to run
                   work/<stage>/attempt_<n>           log, progress, metrics, outcome
                   work/<stage>/beat_<n>.json         heartbeat: a counter that grows while the attempt lives
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
class AttemptNames:
    """Names of one attempt, below the run's folder in a storage or on a node."""

    stage: str
    """The stage's folder name, `<stage>-<fingerprint>`."""
    attempt: int

    @property
    def job(self) -> str:
        """Return the name of the job's JSON file."""
        return f"work/{self.stage}/attempt_{self.attempt}.job.json"

    @property
    def folder(self) -> str:
        """Return the name of the tree with log, progress, metrics and outcome."""
        return f"work/{self.stage}/attempt_{self.attempt}"

    @property
    def heartbeat(self) -> str:
        """Return the name of the heartbeat file."""
        return f"work/{self.stage}/beat_{self.attempt}.json"

    @property
    def state(self) -> str:
        """Return the name of the tree with the checkpoints, which all attempts share."""
        return f"work/{self.stage}/state"

    @property
    def artifact(self) -> str:
        """Return the name of the stage's artifact."""
        return f"artifacts/{self.stage}"

    def next(self) -> "AttemptNames":
        """Return the names of the next attempt; if its job exists, this attempt is fenced."""
        return AttemptNames(self.stage, self.attempt + 1)


def get_attempt_names(job: Job) -> AttemptNames:
    """Return the names of a job's attempt."""
    return AttemptNames(Path(job.artifact).name, job.attempt)


def rebase_paths(job: Job, source: Path, target: Path) -> Job:
    """Return the job with every path below `source` moved to the same place below `target`."""

    def rebase(path: str) -> str:
        return str(target / Path(path).relative_to(source))

    return replace(
        job,
        inputs={role: rebase(path) for role, path in job.inputs.items()},
        artifact=rebase(job.artifact),
        scratch=rebase(job.scratch),
        stop_files=tuple(rebase(path) for path in job.stop_files),
    )


def hash_spec(spec: dict[str, Any]) -> str:
    """Return the SHA-256 of a job's JSON form; the island refuses a job whose hash differs from the submitted one."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()


def parse_job(spec: dict[str, Any], expected: str) -> Job:
    """Parse a job's JSON form; raise `IslandError` if its hash is not `expected` or its fields do not fit."""
    if hash_spec(spec) != expected:
        raise IslandError(
            "the job in the storage must be the submitted one; its hash differs, so the storage was modified; "
            "check who can write to it, and submit again"
        )
    try:
        return TypeAdapter(Job).validate_python(spec)
    except ValidationError as error:
        raise IslandError(f"the job was written by another version of this project: {error}") from error


def render_job(job: Job) -> dict[str, Any]:
    """Return the JSON form of a job."""
    return dict(to_jsonable(job))
