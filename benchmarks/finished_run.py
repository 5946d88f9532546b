"""A run of the pipeline that a benchmark brings to its end and then looks into."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from rich.console import Console

from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import RunConfig, parse_config
from orchestrator.controller import run_pipeline
from orchestrator.pipeline.graph import build_graph
from orchestrator.pipeline.stage import Stage
from orchestrator.run.run_folder import RunFolder

Scores = dict[str, Any]
SPACES = ("pixels", "efficientnet_lite0")
"""In which scores are compared."""


@dataclass(frozen=True)
class FinishedRun:
    """A run whose stages are all finished."""

    config: RunConfig

    @classmethod
    def of(cls, name: str, overrides: Sequence[str]) -> Self:
        """A run that is brought to its end now; what is finished already is found. `name` is said if it is stopped."""
        config = parse_config(compose(overrides))
        if run_pipeline(config, Console(quiet=True)).stopped:
            raise SystemExit(f"stopped in {name!r} with seed {config.seed}; the same command goes on from there")
        return cls(config)

    @cached_property
    def run(self) -> RunFolder:
        """The run folder, which other runs may share."""
        return RunFolder(Path(self.config.folder))

    @cached_property
    def stages(self) -> dict[str, Stage]:
        """By name."""
        return {stage.name: stage for stage in build_graph(self.config)}

    def folder(self, stage: str) -> Path:
        """A stage's artifact."""
        return self.run.artifact(self.stages[stage])
