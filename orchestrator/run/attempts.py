"""Read the attempts of a run from its folder: where each ran, from when to when, and its training steps.

Times are those that the worker wrote, so they are right even if the controller was away. If a worker on this machine
died before it wrote its end, the end is the age of its newest file. Files of an attempt on an island are only copies,
so their age is not used.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pydantic import FiniteFloat

from ddm_core.artifacts import MAX_SMALL_BYTES, CorruptArtifact, is_finished, read_manifest
from ddm_core.json_values import read_record
from orchestrator.config.compute import CONTROLLER, ResourcesConfig
from orchestrator.pipeline.stage import Stage
from orchestrator.run.backend import AttemptOutcome, Job
from orchestrator.run.lease import ProcessRecord
from orchestrator.run.metrics_rows import read_last_row
from orchestrator.run.run_folder import RunFolder, attempt_number

T = TypeVar("T")

CONTINUED = re.compile(r"continuing from step ([0-9]{1,18})")
"""The log line of `experts/training/checkpoint.py` when a training resumes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """The training steps of one attempt."""

    first: int
    """First step: 0, or the step of the checkpoint from which it resumed."""
    last: int
    """Last reported step."""
    seconds_per_step: float | None
    """None if it reported fewer than two times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One attempt of one stage that a worker has started."""

    stage: str
    attempt: int
    folder: Path
    """The attempt's folder; attempts with the same parent folder share checkpoints."""
    island: str
    """Empty for backends with only one place."""
    place: str
    """Host and process."""
    resources: ResourcesConfig
    start: float
    """Seconds since the epoch."""
    end: float
    """Its last sign of activity if it has not ended or was killed."""
    cpu_s: float
    """CPU seconds that it used; 0 is unknown, such as for an attempt that still runs or was killed."""
    state: str
    """As in `AttemptOutcome`, or `running`, which includes attempts whose state is not known yet."""
    error: str
    progress: "Progress | None"
    """None before its first report."""
    process: ProcessRecord
    """Its worker's process."""

    @property
    def is_local(self) -> bool:
        """Return whether it runs on the controller's machine or a cluster that shares its disk, not on an island."""
        return self.island in ("", CONTROLLER)

    @property
    def steps(self) -> Steps | None:
        """Read the attempt's training steps; None unless its training started."""
        return _read_steps(self.folder, self.progress)

    @property
    def seconds(self) -> float:
        """Return the time from start to end, in seconds."""
        return self.end - self.start


def load_attempts(run: RunFolder, graph: Sequence[Stage]) -> list[Attempt]:
    """Return every attempt of a graph's stages, in the order of their starts."""
    folders = {run.work(stage) for stage in graph}
    return [attempt for attempt in load_all_attempts(run) if attempt.folder.parent in folders]


def load_all_attempts(run: RunFolder) -> list[Attempt]:
    """Return every attempt in this run folder, also of earlier configurations, in the order of their starts."""
    attempts = [
        _load_attempt(run, folder, last=folder == folders[-1])
        for folders in run.attempted_stages()
        for folder in folders
    ]
    return sorted((attempt for attempt in attempts if attempt is not None), key=lambda attempt: attempt.start)


def _load_attempt(run: RunFolder, folder: Path, *, last: bool) -> Attempt | None:
    """Return one attempt; None if no worker has started it."""
    if not (folder / "worker.json").is_file():
        return None
    worker, job = read_record(ProcessRecord, folder / "worker.json"), _read_optional(Job, folder / "job.json")
    progress, outcome = load_progress(folder), load_outcome(folder)
    island = job.island if job else ""
    start = worker.get("time") or (folder / "worker.json").stat().st_mtime
    ended = outcome.ended if outcome else 0.0
    return Attempt(
        stage=folder.parent.name.rpartition("-")[0],
        attempt=attempt_number(folder),
        folder=folder,
        island=island,
        place=f"{worker['host']}:{worker['pid']}",
        resources=job.resources if job else ResourcesConfig(),
        start=start,
        end=max(start, ended or _last_activity(folder, progress, is_local=island in ("", CONTROLLER))),
        state=outcome.state if outcome else _infer_state(run, folder, last=last),
        error=outcome.error if outcome else "",
        cpu_s=outcome.cpu_s if outcome else 0.0,
        progress=progress,
        process=worker,
    )


def load_outcome(attempt: Path) -> AttemptOutcome | None:
    """Return how an attempt ended; None if it runs, or its worker died before it wrote that."""
    return _read_optional(AttemptOutcome, attempt / "outcome.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The latest progress report of an attempt."""

    done: FiniteFloat = 0.0
    total: FiniteFloat | None = None
    """None is unknown."""
    unit: str = ""
    left_s: FiniteFloat | None = None
    pace: FiniteFloat = 0.0
    """Units per second."""
    time: FiniteFloat = 0.0
    """Seconds since the epoch."""
    figures: dict[str, FiniteFloat] = field(default_factory=dict)
    is_damaged: bool = False
    """Whether the file cannot be read; the other fields then mean nothing."""


DAMAGED_PROGRESS = Progress(is_damaged=True)


def load_progress(attempt: Path) -> Progress | None:
    """Return the latest progress that an attempt reported; None before its first report.

    Progress is an observation, on which no result depends. So a damaged file is reported as such and blocks nothing.
    """
    path = attempt / "progress.json"
    if not path.is_file():
        return None
    try:
        return read_record(Progress, path)
    except CorruptArtifact:
        return DAMAGED_PROGRESS


def _read_optional(cls: type[T], path: Path) -> T | None:
    return read_record(cls, path) if path.is_file() else None


def _infer_state(run: RunFolder, folder: Path, *, last: bool) -> str:
    """Return the state of an attempt without an outcome: its worker may have died right after it published."""
    artifact = run.artifact_of_attempt(folder)
    if is_finished(artifact):
        return "finished" if read_manifest(artifact).attempt == attempt_number(folder) else "lost"
    return "running" if last else "lost"


def _last_activity(folder: Path, progress: Progress | None, *, is_local: bool) -> float:
    """Return when the attempt last wrote a file; files that the controller writes do not count."""
    if not is_local:
        return progress.time if progress else 0.0
    worker_files = (path for path in folder.iterdir() if path.name not in ("job.json", "outcome.json", "stop"))
    return max([progress.time if progress else 0.0, *(path.stat().st_mtime for path in worker_files)])


def _read_steps(folder: Path, progress: Progress | None) -> Steps | None:
    """Return an attempt's steps; its metrics file exists from the start of training and has all attempts' rows."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        return None
    first, row = read_resume_step(folder), read_last_row(metrics)
    last = int(row["step"]) if row else 0
    return Steps(first=first, last=max(first, last), seconds_per_step=_seconds_per_step(progress))


def read_resume_step(attempt: Path) -> int:
    """Return the step from which an attempt resumed, from its log; 0 if it started from scratch."""
    log = attempt / "log.txt"
    steps = CONTINUED.findall(_read_end(log)) if log.is_file() else []
    return int(steps[-1]) if steps else 0


def _read_end(path: Path) -> str:
    """Return the last `MAX_SMALL_BYTES` of a text that may be damaged."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - MAX_SMALL_BYTES))
        return file.read().decode(errors="replace")


def _seconds_per_step(progress: Progress | None) -> float | None:
    """Return the mean seconds per step since the first report."""
    return 1 / progress.pace if progress and progress.unit == "steps" and progress.pace > 0 else None
