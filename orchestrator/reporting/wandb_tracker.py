"""Weights & Biases: one wandb run per trained model, one group per run; the only file that imports wandb.

The source of truth is `metrics.jsonl` of every attempt. The tracker follows it and stores the last logged step, so
that a resumed run logs no step twice. It never prompts for an account: `offline` writes below the run folder.

`python -m orchestrator.reporting.wandb_tracker RUN` tracks one execution of a run, as a child of the controller
(`tracker_process.py`): wandb waits for servers, and whatever it raises ends this process alone.
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

from ddm_core.artifacts import read_json, write_json
from orchestrator.config.schema import TrackingConfig
from orchestrator.config.stage_kinds import TRAINING_KINDS
from orchestrator.errors import ConfigError
from orchestrator.pipeline.stage import Stage
from orchestrator.reporting.costs import load_costs
from orchestrator.reporting.results import current_graph
from orchestrator.run.run_folder import RunFolder

POLL_EVERY_S, RETRY_AFTER_S = 2.0, 60.0

MAX_GROUP_LENGTH = 80
"""Characters of the run's name in the ids; wandb allows 128 for the whole id."""


def track(folder: Path) -> None:
    """Log what the run writes until the controller says `end`, then the rest; exit with code 1 at the time limit."""
    from wandb.errors import Error

    run = RunFolder(folder)
    config = run.load_config()
    tracker, ended = WandbTracker(run, config.wandb, wandb_name(config.name)), threading.Event()
    threading.Thread(target=_watch_input, args=(ended, config.wandb.finish_s), daemon=True).start()
    graph, wait_s = current_graph(run, config), POLL_EVERY_S
    while not ended.wait(wait_s):
        wait_s = POLL_EVERY_S
        try:
            tracker.log_rows(graph)
        except Error as error:
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


def wandb_name(text: str) -> str:
    """Return a name without the characters that wandb reserves; a changed or shortened one gets a hash to stay unique.

    >>> wandb_name("digits")
    'digits'
    """
    safe = re.sub(r"[^\w.-]", "-", text, flags=re.ASCII)[: MAX_GROUP_LENGTH - 9]
    return safe if safe == text else f"{safe}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


class WandbTracker:
    """Logs to wandb what the attempts have written since the last call."""

    def __init__(self, run: RunFolder, config: TrackingConfig, group: str) -> None:
        self.run, self.config, self.group = run, config, group
        self._runs: dict[str, Any] = {}

    def log_rows(self, graph: list[Stage]) -> None:
        """Log the new rows of all trained models."""
        for stage in graph:
            if stage.kind in TRAINING_KINDS and self.run.attempts(stage):
                self._log_rows(stage)

    def finish(self, graph: list[Stage]) -> None:
        """Log the remaining rows, the pictures, the scores and the costs, and finish every wandb run."""
        self.log_rows(graph)
        for stage in graph:
            if stage.kind == "score" and self.run.is_finished(stage) and not self._last_logged_step(stage):
                self._log_score(stage)
        self._log_costs()
        for run in self._runs.values():
            run.finish()

    def _log_costs(self) -> None:
        """Write the costs of every stage so far into the summary of its wandb run."""
        for row in load_costs(self.run) if self._runs else []:
            if row.stage in self._runs:
                figures = asdict(row) | {"goodput": row.goodput}
                del figures["stage"]
                self._runs[row.stage].summary.update({f"cost/{name}": value for name, value in figures.items()})

    def _log_rows(self, stage: Stage) -> None:
        last = self._last_logged_step(stage)
        rows = [row for row in self._load_rows(stage) if row["step"] > last]
        for row in rows:
            self._wandb_run(stage).log({name: value for name, value in row.items() if name != "step"}, step=row["step"])
        if rows:
            self._save_step(stage, rows[-1]["step"])

    def _load_rows(self, stage: Stage) -> list[dict[str, Any]]:
        """Return the complete rows of the latest attempt that has any."""
        for attempt in reversed(self.run.attempts(stage)):
            path = attempt / "metrics.jsonl"
            if path.is_file():
                complete = path.read_text(encoding="utf-8").rpartition("\n")[0]
                return [json.loads(line) for line in complete.splitlines()]
        return []

    def _log_score(self, stage: Stage) -> None:
        import wandb

        artifact = self.run.artifact(stage)
        scores = read_json(artifact / "scores.json")
        self._wandb_run(stage).log({"samples": wandb.Image(str(artifact / "grid.png"))} | _numbers(scores))
        self._save_step(stage, 1)

    def _wandb_run(self, stage: Stage) -> Any:
        if stage.name not in self._runs:
            import wandb

            self.run.tracking.mkdir(exist_ok=True)
            os.environ.setdefault("WANDB_SILENT", "true")
            tracked = self._runs[stage.name] = wandb.init(
                project=self.config.project,
                group=self.group,
                name=stage.name,
                id=f"{self.group}-{stage.folder_name}",
                mode=self.config.mode,
                dir=str(self.run.root),
                reinit="create_new",
                resume="allow" if self.config.mode == "online" else None,
                settings=wandb.Settings(console="off", silent=True),
            )
            # It leads out of the run folder, and a copy of a folder with such a link is not trusted.
            Path(tracked.settings.log_internal).with_name("debug-core.log").unlink(missing_ok=True)
        return self._runs[stage.name]

    def _last_logged_step(self, stage: Stage) -> int:
        """Return the last step that was logged to wandb; 0 for none."""
        path = self.run.tracking / f"{stage.folder_name}.json"
        return int(read_json(path)["step"]) if path.is_file() else 0

    def _save_step(self, stage: Stage, step: int) -> None:
        write_json(self.run.tracking / f"{stage.folder_name}.json", {"step": step})


def require_account(config: TrackingConfig) -> None:
    """Raise `ConfigError` if wandb is to be online and has no API key, because it would prompt for one in the run."""
    if config.mode != "online":
        return
    import wandb

    if not wandb.api.api_key:
        raise ConfigError("wandb.mode=online needs an account: run `wandb login`, or set wandb.mode=offline")


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
