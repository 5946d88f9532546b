"""What every attempt says about itself: where it ran, from when to when, how far it came; read from the run folder.

Times are those that the worker wrote down, so that they hold when the controller was away. What a worker at home did
not live to write is taken from the age of its files; the files of an attempt on an island are only copies.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from ddm_core.artifacts import is_finished, read_json, read_manifest
from orchestrator.config.compute import CONTROLLER, ResourcesConfig
from orchestrator.pipeline.stage import Stage
from orchestrator.run.run_folder import RunFolder, attempt_number

CONTINUED = re.compile(r"continuing from step (\d+)")
"""What `experts/training/checkpoint.py` logs when a training goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """How far one attempt of a training came."""

    first: int
    """Where it began: 0, or the step of the checkpoint that it found."""
    last: int
    """The last one that it reported."""
    seconds_each: float | None
    """None if it did not report twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One attempt of one stage that a worker began."""

    stage: str
    attempt: int
    folder: Path
    """What it wrote; attempts that share its parent share checkpoints."""
    island: str
    """Empty for backends that are one place."""
    place: str
    """Host and process."""
    resources: ResourcesConfig
    start: float
    """Seconds since the epoch."""
    end: float
    """For one that has not ended or was cut short: its last word."""
    state: str
    """As in `Outcome`, or `running`, which also stands for what nobody knows yet."""
    error: str
    steps: Steps | None
    """None unless it began to train."""

    @property
    def seconds(self) -> float:
        """How long its worker was busy."""
        return self.end - self.start


def attempts_of(run: RunFolder, graph: Sequence[Stage]) -> list[Attempt]:
    """Every attempt at the stages of a graph, in the order of their starts."""
    folders = {run.work(stage) for stage in graph}
    return [attempt for attempt in all_attempts(run) if attempt.folder.parent in folders]


def all_attempts(run: RunFolder) -> list[Attempt]:
    """Every attempt that was ever begun in this run folder, those of earlier configurations too, in their order."""
    found = [_read(run, folder, last=folder == folders[-1]) for folders in run.attempted_stages() for folder in folders]
    return sorted((attempt for attempt in found if attempt is not None), key=lambda attempt: attempt.start)


def _read(run: RunFolder, folder: Path, *, last: bool) -> Attempt | None:
    """One attempt; None if no worker has begun it."""
    if not (folder / "worker.json").is_file():
        return None
    worker, job = read_json(folder / "worker.json"), _read_if_there(folder / "job.json")
    progress, outcome = _read_if_there(folder / "progress.json"), _read_if_there(folder / "outcome.json")
    island = job.get("island", "")
    start = worker.get("time") or (folder / "worker.json").stat().st_mtime
    return Attempt(
        stage=folder.parent.name.rpartition("-")[0],
        attempt=attempt_number(folder),
        folder=folder,
        island=island,
        place=f"{worker['host']}:{worker['pid']}",
        resources=TypeAdapter(ResourcesConfig).validate_python(job.get("resources", {})),
        start=start,
        end=max(start, outcome.get("ended") or _last_word(folder, progress, at_home=island in ("", CONTROLLER))),
        state=outcome.get("state") or _state_without_word(run, folder, last=last),
        error=outcome.get("error", ""),
        steps=_steps(folder, progress),
    )


def _read_if_there(path: Path) -> dict[str, Any]:
    return dict(read_json(path)) if path.is_file() else {}


def _state_without_word(run: RunFolder, folder: Path, *, last: bool) -> str:
    """How an attempt stands that left no outcome: its worker may have died right after it had published."""
    artifact = run.artifact_of(folder)
    if is_finished(artifact):
        return "finished" if read_manifest(artifact).attempt == attempt_number(folder) else "lost"
    return "running" if last else "lost"


def _last_word(folder: Path, progress: dict[str, Any], *, at_home: bool) -> float:
    """When the attempt last wrote something; what the controller wrote about it does not count."""
    told = float(progress.get("time", 0.0))
    if not at_home:
        return told
    own = (path for path in folder.iterdir() if path.name not in ("job.json", "outcome.json", "stop"))
    return max([told, *(path.stat().st_mtime for path in own)])


def _steps(folder: Path, progress: dict[str, Any]) -> Steps | None:
    """How far a training came; the metrics file appears when it begins, and holds the earlier attempts' rows."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        return None
    first = resumed_from_step(folder)
    rows = metrics.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
    last = int(json.loads(rows[-1])["step"]) if rows else 0
    return Steps(first=first, last=max(first, last), seconds_each=_pace(progress))


def resumed_from_step(attempt: Path) -> int:
    """The step from which an attempt went on, by its log; 0 if it began at the beginning."""
    log = attempt / "log.txt"
    said = CONTINUED.findall(log.read_text(encoding="utf-8")) if log.is_file() else []
    return int(said[-1]) if said else 0


def _pace(progress: dict[str, Any]) -> float | None:
    """Seconds a step since the first report."""
    pace = float(progress.get("pace", 0.0)) if progress.get("unit") == "steps" else 0.0
    return 1 / pace if pace > 0 else None
