"""Weights & Biases: one wandb run per trained model, one group per run; the one file that imports wandb.

The truth is `metrics.jsonl` of every attempt. This file follows it and remembers how far it came, so that a resumed
run logs no step twice. Nothing here ever asks for an account: `offline` writes below the run folder.
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ddm_core.artifacts import read_json, write_json
from orchestrator.config.schema import TrackingConfig
from orchestrator.errors import ConfigError
from orchestrator.pipeline.stage import Stage
from orchestrator.reporting.costs import cost_rows
from orchestrator.run.run_folder import RunFolder

FOLLOW_EVERY_S = 2.0
TRAINED = ("expert", "router", "monolith", "cluster_conditioned", "distilled_monolith")


class WandbTracker:
    """Tells wandb what the attempts have written since the last time."""

    def __init__(self, run: RunFolder, config: TrackingConfig, group: str) -> None:
        self.run, self.config, self.group = run, config, group
        self._runs: dict[str, Any] = {}
        self._looked = 0.0
        if config.mode == "online":
            _refuse_without_account()

    def follow(self, running: Sequence[Stage]) -> None:
        """Log the new rows of all running stages."""
        if self.config.mode != "disabled" and time.monotonic() - self._looked > FOLLOW_EVERY_S:
            self._looked = time.monotonic()
            for stage in running:
                if stage.kind in TRAINED:
                    self._log_rows(stage)

    def close(self, graph: Sequence[Stage]) -> None:
        """Log what is left, the pictures, the scores and the costs, and end every wandb run."""
        if self.config.mode == "disabled":
            return
        for stage in graph:
            if stage.kind in TRAINED and self.run.attempts(stage):
                self._log_rows(stage)
            if stage.kind == "score" and self.run.finished(stage) and not self._logged_so_far(stage):
                self._log_score(stage)
        self._log_costs()
        for run in self._runs.values():
            run.finish()

    def _log_costs(self) -> None:
        """Put what every stage has cost so far into its wandb run's summary."""
        for row in cost_rows(self.run) if self._runs else []:
            if row.stage in self._runs:
                figures = asdict(row) | {"goodput": row.goodput}
                del figures["stage"]
                self._runs[row.stage].summary.update({f"cost/{name}": value for name, value in figures.items()})

    def _log_rows(self, stage: Stage) -> None:
        last = self._logged_so_far(stage)
        rows = [row for row in self._rows(stage) if row["step"] > last]
        for row in rows:
            self._wandb_run(stage).log({name: value for name, value in row.items() if name != "step"}, step=row["step"])
        if rows:
            self._remember(stage, rows[-1]["step"])

    def _rows(self, stage: Stage) -> list[dict[str, Any]]:
        """The rows of the latest attempt that has any; a line that is being written is left for later."""
        for attempt in reversed(self.run.attempts(stage)):
            written = attempt / "metrics.jsonl"
            if written.is_file():
                whole = written.read_text(encoding="utf-8").rpartition("\n")[0]
                return [json.loads(line) for line in whole.splitlines()]
        return []

    def _log_score(self, stage: Stage) -> None:
        import wandb

        artifact = self.run.artifact(stage)
        scores = read_json(artifact / "scores.json")
        self._wandb_run(stage).log({"samples": wandb.Image(str(artifact / "grid.png"))} | _numbers(scores))
        self._remember(stage, 1)

    def _wandb_run(self, stage: Stage) -> Any:
        if stage.name not in self._runs:
            import wandb

            self.run.tracking.mkdir(exist_ok=True)
            os.environ.setdefault("WANDB_SILENT", "true")
            self._runs[stage.name] = wandb.init(
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
        return self._runs[stage.name]

    def _logged_so_far(self, stage: Stage) -> int:
        """The last step that wandb knows of; 0 for none."""
        written = self.run.tracking / f"{stage.folder_name}.json"
        return int(read_json(written)["step"]) if written.is_file() else 0

    def _remember(self, stage: Stage, step: int) -> None:
        write_json(self.run.tracking / f"{stage.folder_name}.json", {"step": step})


def _refuse_without_account() -> None:
    """Say before anything runs that there is no key; wandb would ask for one in the middle of the run."""
    import wandb

    if not wandb.api.api_key:
        raise ConfigError("wandb.mode=online needs an account: run `wandb login`, or take wandb.mode=offline")


def _numbers(scores: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """All numbers of nested scores, under names such as `pixels/fd`."""
    flat: dict[str, float] = {}
    for name, value in scores.items():
        if isinstance(value, dict):
            flat |= _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            flat[f"{prefix}{name}"] = float(value)
    return flat
