"""A pipeline run that a benchmark completes and then reads."""

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
SHARED_STAGES = (
    "codec.decoder_training.seed=0",
    "partition.features=random_conv",
    "partition.num_fine=128",
    "partition.iterations=10",
    "partition.num_experts=8",
    "partition.seed=0",
)
"""Codec and eight clusters that every seed shares, so that seeds change the trainings alone."""

SPACES = ("pixels", "efficientnet_lite0")
"""Feature spaces in which scores are compared."""


@dataclass(frozen=True)
class FinishedRun:
    """A run whose stages are all finished."""

    config: RunConfig

    @classmethod
    def complete(cls, name: str, overrides: Sequence[str]) -> Self:
        """Run all unfinished stages of a pipeline; finished ones are reused.

        Raises:
            SystemExit: The run was stopped; the message contains `name`.
        """
        config = parse_config(compose(overrides))
        if run_pipeline(config, Console(quiet=True)).stopped:
            raise SystemExit(f"stopped in {name!r} with seed {config.seed}; run the same command again to continue")
        return cls(config)

    @cached_property
    def run_folder(self) -> RunFolder:
        """Return the run folder; other runs may share it."""
        return RunFolder(Path(self.config.folder))

    @cached_property
    def stages(self) -> dict[str, Stage]:
        """Return the stages by name."""
        return {stage.name: stage for stage in build_graph(self.config)}

    def artifact_folder(self, stage: str) -> Path:
        """Return the artifact folder of a stage."""
        return self.run_folder.artifact(self.stages[stage])
