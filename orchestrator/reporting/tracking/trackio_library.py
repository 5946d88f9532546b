"""trackio, a small replacement of wandb with a dashboard on this machine (`trackio show`); imported here alone."""

import importlib
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.config.schema import TrackingConfig
from orchestrator.errors import ConfigError

ADDRESSES = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")
"""Environment variables with the place where trackio sends what it records."""


class TrackioLibrary:
    """Records with trackio: below the run folder, or at the address in its environment variables."""

    error: type[Exception] = OSError

    def require_account(self, config: TrackingConfig) -> None:
        """Raise `ConfigError` if trackio is not installed, or is to be online without an address."""
        if importlib.util.find_spec("trackio") is None:
            raise ConfigError("wandb.library=trackio needs a package: pip install trackio, or set wandb.library=wandb")
        if config.mode == "online" and not any(os.environ.get(name) for name in ADDRESSES):
            raise ConfigError(
                f"wandb.mode=online with trackio needs {' or '.join(ADDRESSES)}; or set wandb.mode=offline"
            )

    def open(self, config: TrackingConfig, folder: Path, names: Mapping[str, str], settings: Any) -> "TrackioStage":
        """Begin, or continue, a trackio run; offline it is stored in `trackio/` of the run folder."""
        if config.mode == "offline":
            os.environ["TRACKIO_DIR"] = str(folder / "trackio")
            for name in ADDRESSES:
                os.environ.pop(name, None)
        trackio = importlib.import_module("trackio")
        run = trackio.init(
            project=config.project, name=names["id"], group=names["group"], config=settings, resume="allow", embed=False
        )
        return TrackioStage(trackio, run)


class TrackioStage:
    """One trackio run."""

    def __init__(self, trackio: Any, run: Any) -> None:
        self._trackio, self._run = trackio, run

    def log(self, figures: Mapping[str, Any], step: int) -> None:
        """Log figures of a step."""
        self._run.log(dict(figures), step=step)

    def log_image(self, name: str, file: Path, figures: Mapping[str, float]) -> None:
        """Log an image and its figures."""
        self._run.log({name: self._trackio.Image(str(file)), **figures})

    def finish(self, costs: Mapping[str, Any]) -> None:
        """Log the costs, as trackio has no summary, and write the rest."""
        if costs:
            self._run.log(dict(costs))
        self._run.finish()
