"""Results of a run so far, read from its artifacts: the rows of the tables that people see."""

from collections.abc import Sequence
from functools import reduce
from typing import Any

from ddm_core.artifacts import read_json, read_manifest
from orchestrator.config.schema import RunConfig
from orchestrator.config.stage_kinds import OUR_KINDS
from orchestrator.pipeline.graph import build_graph
from orchestrator.pipeline.stage import Stage, remove_stage
from orchestrator.reporting.tables.ranking import ScoreRow
from orchestrator.run.run_folder import RunFolder


def current_graph(run: RunFolder, config: RunConfig) -> list[Stage]:
    """Return the graph, without the experts that a finished ensemble lacks."""
    graph = build_graph(config)
    missing = [stage.name for stage in graph if stage.optional and not run.is_finished(stage)]
    reduced = reduce(remove_stage, missing, graph) if len(missing) < config.partition.num_experts else graph
    return reduced if has_ensemble(run, reduced) else graph


def has_ensemble(run: RunFolder, graph: Sequence[Stage]) -> bool:
    """Return whether the ensemble of this graph is finished."""
    return any(stage.name == "ensemble" and run.is_finished(stage) for stage in graph)


def load_score_rows(run: RunFolder, graph: Sequence[Stage]) -> list[ScoreRow]:
    """Return every finished score, the monolith first, then the default selection."""
    stages = [stage for stage in graph if stage.kind == "score" and run.is_finished(stage)]
    default = next((stage.name for stage in graph if stage.kind == "score"), "")
    rows = [
        ScoreRow(
            name=stage.name.removeprefix("score_"),
            scores=read_json(run.verify_file(stage, "scores.json")),
            is_default=stage.name == default,
        )
        for stage in stages
    ]
    return sorted(rows, key=lambda row: (row.name != "monolith", not row.is_default))


def selection_choice(run: RunFolder, graph: Sequence[Stage]) -> dict[str, Any] | None:
    """Return `selection_choice.json`: selection of `auto`, reason, candidates; None without a finished search."""
    stage = next((stage for stage in graph if stage.kind == "selection_search" and run.is_finished(stage)), None)
    return None if stage is None else dict(read_json(run.verify_file(stage, "selection_choice.json")))


def load_training_flops(run: RunFolder, graph: Sequence[Stage]) -> dict[str, float]:
    """Return FLOPs of every finished stage of either side's training; a selection search belongs to the ensemble's."""
    return {
        stage.name: read_manifest(run.artifact(stage)).flops
        for stage in graph
        if stage.kind in (*OUR_KINDS, "monolith") and run.is_finished(stage)
    }
