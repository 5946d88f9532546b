"""Weights & Biases: one wandb run per stage; the only file that imports wandb."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb
from wandb.errors import Error

from orchestrator.config.schema import TrackingConfig
from orchestrator.errors import ConfigError


class WandbLibrary:
    """Records with wandb; it never prompts for an account: `offline` writes below the run folder."""

    error: type[Exception] = Error

    def require_account(self, config: TrackingConfig) -> None:
        """Raise `ConfigError` if wandb is to be online and has no API key, because it would prompt for one."""
        if config.mode == "online" and not wandb.api.api_key:
            raise ConfigError("wandb.mode=online needs an account: run `wandb login`, or set wandb.mode=offline")

    def open(self, config: TrackingConfig, folder: Path, names: Mapping[str, str], settings: Any) -> "WandbStage":
        """Begin, or continue, a wandb run."""
        os.environ.setdefault("WANDB_SILENT", "true")
        run = wandb.init(
            project=config.project,
            name=names["name"],
            group=names["group"],
            id=names["id"],
            config=settings,
            mode=config.mode,
            dir=str(folder),
            reinit="create_new",
            resume="allow" if config.mode == "online" else None,
            settings=wandb.Settings(console="off", silent=True),
        )
        # It leads out of the run folder, and a copy of a folder with such a link is not trusted.
        Path(run.settings.log_internal).with_name("debug-core.log").unlink(missing_ok=True)
        return WandbStage(run)


class WandbStage:
    """One wandb run."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, figures: Mapping[str, Any], step: int) -> None:
        """Log figures of a step."""
        self._run.log(dict(figures), step=step)

    def log_image(self, name: str, file: Path, figures: Mapping[str, float]) -> None:
        """Log an image and its figures."""
        self._run.log({name: wandb.Image(str(file)), **figures})

    def finish(self, costs: Mapping[str, Any]) -> None:
        """Write the costs into the summary, and send the rest."""
        self._run.summary.update(dict(costs))
        self._run.finish()
