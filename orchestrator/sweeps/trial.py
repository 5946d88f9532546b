"""A trial: one run of a sweep, named by the values that are swept."""

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

LONGEST_LABEL = 150
"""Characters of a folder's name; file systems allow 255 bytes."""


class SweepStopped(OrchestratorError):
    """The sweep was asked to stop, or one of its trials was; the same command goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepTrial:
    """One run of a sweep."""

    number: int
    label: str
    """The swept values, such as `partition.num_experts=2`: the name of its folder."""
    config: RunConfig | None
    """None if the values do not make a configuration."""
    parameters: dict[str, str] = field(default_factory=dict)
    """Swept key and value, as they are written on the command line."""
    error: str = ""
    """Why there is no configuration."""

    @property
    def run(self) -> RunFolder:
        """Its run folder; raises `ConfigError` if it has no configuration."""
        if self.config is None:
            raise ConfigError(f"trial {self.label} has no configuration: {self.error}")
        return RunFolder(Path(self.config.folder).expanduser())

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to do: every stage that the ensemble stands on, and the report."""
        return self.config is not None and is_finished(self.run, self.config)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialEnd:
    """How a trial ended, this time."""

    trial: SweepTrial
    state: Literal["finished", "failed", "stopped"]
    seconds: float = 0.0
    """How long it took this time; 0 if it was finished before."""
    score: float | None = None
    """The sweep's metric; None if the run does not have it."""
    error: str = ""


def is_finished(run: RunFolder, config: RunConfig) -> bool:
    """Whether every stage of the run is finished but for experts that its ensemble had to do without."""
    return run.report.is_file() and all(run.finished(stage) for stage in current_graph(run, config))


def trial_config(composed: Mapping[str, Any], label: str) -> RunConfig:
    """The configuration of a trial: the composed one, in a folder and under a name that carry the label."""
    own = {"name": f"{composed['name']}-{label}", "folder": f"{composed['folder']}/{label}"}
    return parse_config({**composed, **own})


def trial_label(parameters: Mapping[str, str]) -> str:
    """A folder's name for the swept values; one that had to be changed or cut carries a hash, so that no two clash."""
    text = ",".join(sorted(f"{key.lstrip('+')}={value}" for key, value in parameters.items())) or "only"
    safe = re.sub(r"[^\w.=,+-]", "_", text, flags=re.ASCII)[:LONGEST_LABEL]
    return safe if safe == text else f"{safe}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def swept_parameters(overrides: Iterable[str], swept: Iterable[str]) -> dict[str, str]:
    """The swept keys among a trial's overrides, with their values."""
    pairs = (text.partition("=") for text in overrides)
    wanted = set(swept)
    return {key.lstrip("+"): value for key, _, value in pairs if key.lstrip("+") in wanted}
