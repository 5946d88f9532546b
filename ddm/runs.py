"""A run folder as a Python object."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ddm_core.artifacts import read_manifest
from orchestrator.config.schema import RunConfig
from orchestrator.errors import RunFolderError
from orchestrator.pipeline.stage import Stage
from orchestrator.reporting.results import current_graph, find_pipeline, load_score_rows
from orchestrator.reporting.tables.ranking import ScoreRow
from orchestrator.run.run_folder import RunFolder

if TYPE_CHECKING:
    from ddm.pipeline import DDMPipeline

StageState = Literal["finished", "started", "waiting"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStatus:
    """Where one stage of a run is."""

    name: str
    kind: str
    state: StageState
    """`started` is a stage with attempts and no artifact: running, stopped or failed; `ddm status` tells which."""
    attempts: int
    seconds: float | None
    """Wall time of the attempt that finished; None before."""


class Run:
    """A run that exists on disk: its configuration, stages, scores, report and pipelines.

    Reading changes nothing in the folder; `report` writes `report.html`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.folder = RunFolder(Path(path).expanduser())
        """The run folder and the names of everything in it."""
        self.config  # noqa: B018 - a folder that is not a run fails here, not at the first use

    def __repr__(self) -> str:
        return f"Run({str(self.folder.root)!r})"

    @cached_property
    def config(self) -> RunConfig:
        """The configuration of the latest `ddm run` in this folder."""
        return self.folder.load_config()

    @cached_property
    def graph(self) -> list[Stage]:
        """The stages, each behind its inputs; without experts that the finished ensemble lacks."""
        return current_graph(self.folder, self.config)

    def status(self) -> list[StageStatus]:
        """Return one row per stage, as they are on disk now."""
        rows = []
        for stage in self.graph:
            attempts, is_finished = len(self.folder.attempts(stage)), self.folder.is_finished(stage)
            state: StageState = "finished" if is_finished else "started" if attempts else "waiting"
            seconds = read_manifest(self.folder.artifact(stage)).seconds if is_finished else None
            rows.append(StageStatus(name=stage.name, kind=stage.kind, state=state, attempts=attempts, seconds=seconds))
        return rows

    def scores(self) -> list[ScoreRow]:
        """Return the table of scores: the monolith first if there is one, then the default selection."""
        return load_score_rows(self.folder, self.graph)

    def report(self) -> Path:
        """Write `report.html` and return its path."""
        from orchestrator.ui.report import write_report

        return write_report(self.folder)

    def clusters(self) -> list[Path]:
        """Return the shard folders of the clusters, cluster 0 first; raises `RunFolderError` before there are any."""
        folders = sorted((self._artifact("partition") / "clusters").iterdir(), key=lambda folder: int(folder.name))
        return [folder for folder in folders if folder.is_dir()]

    def codec(self) -> Path:
        """Return the folder of the codec with which experts are trained."""
        return self._artifact("codec")

    def pipeline_folder(self, name: str = "ensemble") -> Path:
        """Return the folder of `ensemble`, `monolith` or a compression stage, compared with its checksums."""
        if name in ("ensemble", "monolith"):
            return find_pipeline(self.folder, monolith=name == "monolith")
        return self._artifact(name)

    def pipeline(self, name: str = "ensemble") -> DDMPipeline:
        """Load the ensemble, the `monolith`, or a compression stage such as `quantize`, ready to sample."""
        from ddm.pipeline import DDMPipeline

        return DDMPipeline.from_run(self.folder, self.pipeline_folder(name))

    def _artifact(self, name: str) -> Path:
        stage = next((stage for stage in self.graph if stage.name == name), None)
        if stage is None or not self.folder.is_finished(stage):
            known = ", ".join(row.name for row in self.status() if row.state == "finished") or "none"
            raise RunFolderError(f"{self.folder.root} has no finished stage {name!r}; finished stages: {known}")
        return self.folder.artifact(stage)
