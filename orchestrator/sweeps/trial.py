"""A trial: one run of a sweep, named by its swept values."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from orchestrator.config.schema import RunConfig, parse_config
from orchestrator.errors import ConfigError, OrchestratorError
from orchestrator.reporting.results import current_graph
from orchestrator.run.run_folder import RunFolder

MAX_LABEL_LENGTH = 150
"""Maximum characters of a folder's name before its hash; file systems allow 255 bytes."""


class SweepStopped(OrchestratorError):
    """The sweep or one of its trials was stopped; the same command continues it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepTrial:
    """One run of a sweep."""

    number: int
    label: str
    """The swept values, such as `partition.num_experts=2`; also the name of its folder."""
    config: RunConfig | None
    """None if the values are not a valid configuration, or cannot succeed."""
    parameters: dict[str, str] = field(default_factory=dict)
    """Swept keys and values, as written on the command line."""
    error: str = ""
    """Why there is no configuration."""

    @property
    def run(self) -> RunFolder:
        """Return the trial's run folder; raises `ConfigError` if it has no configuration."""
        if self.config is None:
            raise ConfigError(f"trial {self.label} has no valid configuration: {self.error}")
        return RunFolder(Path(self.config.folder).expanduser())

    @property
    def is_finished(self) -> bool:
        """Return whether the report and all stages are finished, except experts that the ensemble lacks."""
        return self.config is not None and is_run_finished(self.run, self.config)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialEnd:
    """How a trial ended in this call."""

    trial: SweepTrial
    state: Literal["finished", "failed", "stopped"]
    seconds: float = 0.0
    """Duration in this call; 0 if the trial was finished before."""
    score: float | None = None
    """The sweep's metric; None if the run lacks it."""
    error: str = ""


def is_run_finished(run: RunFolder, config: RunConfig) -> bool:
    """Return whether the report and all stages are finished, except experts that the ensemble lacks."""
    return run.report.is_file() and all(run.is_finished(stage) for stage in current_graph(run, config))


def parse_trial_config(composed: Mapping[str, Any], label: str) -> RunConfig:
    """Parse a trial's configuration, with the label added to its name and its folder."""
    names = {"name": f"{composed['name']}-{label}", "folder": f"{composed['folder']}/{label}"}
    return parse_config({**composed, **names})


def label_trial(parameters: Mapping[str, str]) -> str:
    """Return a folder's name for the swept values; a changed or shortened name gets a hash to stay unique."""
    text = ",".join(sorted(f"{key.lstrip('+')}={value}" for key, value in parameters.items())) or "only"
    safe = re.sub(r"[^\w.=,+-]", "_", text, flags=re.ASCII)[:MAX_LABEL_LENGTH]
    return safe if safe == text else f"{safe}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def swept_parameters(overrides: Iterable[str], swept: Iterable[str]) -> dict[str, str]:
    """Return the swept keys among a trial's overrides, with their values."""
    pairs = (text.partition("=") for text in overrides)
    keys = set(swept)
    return {key.lstrip("+"): value for key, _, value in pairs if key.lstrip("+") in keys}
