"""The tracker: one record per trained model and score, one group per run, with wandb or trackio.

The source of truth is `metrics.jsonl` of every attempt. The tracker follows it and stores the last logged step, so
that a resumed run logs no step twice.

`python -m orchestrator.reporting.tracking.tracker RUN` tracks one execution of a run, as a child of the controller
(`process.py`): libraries wait for servers, and whatever they raise ends this process alone.
"""

import hashlib
import json
import os
import re
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ddm_core.artifacts import read_json, to_jsonable, write_json
from orchestrator.config.schema import TrackingConfig
from orchestrator.config.stage_kinds import TRAINING_KINDS
from orchestrator.pipeline.stage import Stage
from orchestrator.reporting.costs import load_costs
from orchestrator.reporting.results import current_graph
from orchestrator.reporting.tracking.library import TrackedStage, load_library
from orchestrator.run.run_folder import RunFolder
from orchestrator.run.step_samples import find_step_samples

POLL_EVERY_S, RETRY_AFTER_S = 2.0, 60.0

VALIDATED = ".validation"
"""Suffix of the files with the last step whose pictures were logged."""

MAX_GROUP_LENGTH = 80
"""Characters of the run's name in the ids; wandb allows 128 for the whole id."""


def track(folder: Path) -> None:
    """Log what the run writes until the controller says `end`, then the rest; exit with code 1 at the time limit."""
    run = RunFolder(folder)
    config = run.load_config()
    tracker, ended = Tracker(run, config.wandb, safe_name(config.name)), threading.Event()
    threading.Thread(target=_watch_input, args=(ended, config.wandb.finish_s), daemon=True).start()
    graph, wait_s = current_graph(run, config), POLL_EVERY_S
    while not ended.wait(wait_s):
        wait_s = POLL_EVERY_S
        try:
            tracker.log_rows(graph)
        except tracker.library.error as error:
            sys.stderr.write(f"{error}\n")
            wait_s = RETRY_AFTER_S
    tracker.finish(current_graph(run, config))


def _watch_input(ended: threading.Event, finish_s: float) -> None:
    """Wait for the controller's `end`; end this process at once if the controller is gone, else after `finish_s`."""
    if sys.stdin.readline():
        ended.set()
        time.sleep(finish_s)
    sys.stderr.write(f"it did not finish within wandb.finish_s = {finish_s:g} s\n")
    os._exit(1)


def safe_name(text: str) -> str:
    """Return a name without characters that libraries reserve; a changed or shortened one gets a hash to stay unique.

    >>> safe_name("digits")
    'digits'
    """
    safe = re.sub(r"[^\w.-]", "-", text, flags=re.ASCII)[: MAX_GROUP_LENGTH - 9]
    return safe if safe == text else f"{safe}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


class Tracker:
    """Records what the attempts have written since the last call."""

    def __init__(self, run: RunFolder, config: TrackingConfig, group: str) -> None:
        self.run, self.config, self.group = run, config, group
        self.library = load_library(config.library)
        self._stages: dict[str, TrackedStage] = {}

    def log_rows(self, graph: list[Stage]) -> None:
        """Log the new rows of all trained models."""
        for stage in graph:
            if stage.kind in TRAINING_KINDS and self.run.attempts(stage):
                self._log_rows(stage)
                self._log_validations(stage)

    def finish(self, graph: list[Stage]) -> None:
        """Log the remaining rows, the pictures, the scores and the costs, and finish every record."""
        self.log_rows(graph)
        for stage in graph:
            if stage.kind == "score" and self.run.is_finished(stage) and not self._last_logged_step(stage):
                self._log_score(stage)
        costs = {row.stage: asdict(row) | {"goodput": row.goodput} for row in load_costs(self.run)}
        for name, tracked in self._stages.items():
            figures = costs.get(name, {})
            tracked.finish({f"cost/{key}": value for key, value in figures.items() if key != "stage"})

    def _log_rows(self, stage: Stage) -> None:
        last = self._last_logged_step(stage)
        rows = [row for row in self._load_rows(stage) if row["step"] > last]
        for row in rows:
            figures = {name: value for name, value in row.items() if name != "step"}
            self._tracked(stage).log(figures, row["step"])
        if rows:
            self._save_step(stage, rows[-1]["step"])

    def _log_validations(self, stage: Stage) -> None:
        """Log the pictures that an expert drew while it trained, with their steps and distances, each once."""
        logged = self._last_logged_step(stage, VALIDATED)
        for step, samples in find_step_samples(self.run, stage).items():
            if step > logged:
                kid = {} if samples.kid is None else {"validation/kid": samples.kid[0]}
                self._tracked(stage).log_image("validation", samples.picture, {"validation/step": step} | kid)
                self._save_step(stage, step, VALIDATED)

    def _load_rows(self, stage: Stage) -> list[dict[str, Any]]:
        """Return the complete rows of the latest attempt that has any."""
        for attempt in reversed(self.run.attempts(stage)):
            path = attempt / "metrics.jsonl"
            if path.is_file():
                complete = path.read_text(encoding="utf-8").rpartition("\n")[0]
                return [json.loads(line) for line in complete.splitlines()]
        return []

    def _log_score(self, stage: Stage) -> None:
        artifact = self.run.artifact(stage)
        scores = read_json(artifact / "scores.json")
        self._tracked(stage).log_image("samples", artifact / "grid.png", _numbers(scores))
        self._save_step(stage, 1)

    def _tracked(self, stage: Stage) -> TrackedStage:
        if stage.name not in self._stages:
            self.run.tracking.mkdir(exist_ok=True)
            names = {"name": stage.name, "group": self.group, "id": f"{self.group}-{stage.folder_name}"}
            settings = to_jsonable(stage.config)
            self._stages[stage.name] = self.library.open(self.config, self.run.root, names, settings)
        return self._stages[stage.name]

    def _last_logged_step(self, stage: Stage, suffix: str = "") -> int:
        """Return the last step that was logged; 0 for none."""
        path = self.run.tracking / f"{stage.folder_name}{suffix}.json"
        return int(read_json(path)["step"]) if path.is_file() else 0

    def _save_step(self, stage: Stage, step: int, suffix: str = "") -> None:
        write_json(self.run.tracking / f"{stage.folder_name}{suffix}.json", {"step": step})


def require_account(config: TrackingConfig) -> None:
    """Raise `ConfigError` if the library or an account for it is missing."""
    if config.mode == "online" or (config.mode == "offline" and config.library != "wandb"):
        load_library(config.library).require_account(config)


def _numbers(scores: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Return all numbers of nested scores, under names such as `pixels/fd`."""
    flat: dict[str, float] = {}
    for name, value in scores.items():
        if isinstance(value, dict):
            flat |= _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            flat[f"{prefix}{name}"] = float(value)
    return flat


if __name__ == "__main__":
    track(Path(sys.argv[1]))
