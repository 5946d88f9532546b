"""The libraries that record curves and images, each behind one file, in one form."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from orchestrator.config.schema import TrackingConfig


class TrackedStage(Protocol):
    """What a library records of one stage, such as the training of an expert."""

    def log(self, figures: Mapping[str, Any], step: int) -> None:
        """Record figures of a step."""

    def log_image(self, name: str, file: Path, figures: Mapping[str, float]) -> None:
        """Record an image and figures that belong to it."""

    def finish(self, costs: Mapping[str, Any]) -> None:
        """Record the costs of the stage, and write what is left."""


class Library(Protocol):
    """A library that records stages; `error` is what it raises when it cannot be reached."""

    error: type[Exception]

    def require_account(self, config: TrackingConfig) -> None:
        """Raise `ConfigError` if `config.mode` needs an account, an address or a package that is missing."""

    def open(self, config: TrackingConfig, folder: Path, names: Mapping[str, str], settings: Any) -> TrackedStage:
        """Begin, or continue, the record of a stage below a run folder; `names` has `name`, `group` and `id`."""


def load_library(name: str) -> Library:
    """Return a library by its name in the configuration; only then is it imported."""
    if name == "trackio":
        from orchestrator.reporting.tracking.trackio_library import TrackioLibrary

        return TrackioLibrary()
    from orchestrator.reporting.tracking.wandb_library import WandbLibrary

    return WandbLibrary()
