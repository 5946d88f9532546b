"""Results of a run so far, read from its artifacts: the rows of the tables that people see."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from rich.table import Table
from rich.text import Text

from ddm_core.artifacts import read_json, read_manifest
from orchestrator.config.schema import RunConfig
from orchestrator.config.stage_kinds import OUR_KINDS
from orchestrator.pipeline.graph import build_graph
from orchestrator.pipeline.stage import Stage, remove_stage
from orchestrator.run.run_folder import RunFolder
from router.config import AUTO


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRow:
    """One row of the table of scores."""

    name: str
    """The selection, or `monolith`."""
    scores: dict[str, Any]
    """`scores.json` of the stage."""
    is_default: bool
    """Whether `ddm sample` generates with it."""

    @property
    def label(self) -> str:
        """Return the name, and for `auto` also the selection that it resolves to."""
        return f"{self.name}: {self.scores['selection']}" if self.name == AUTO else self.name


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


def score_table(rows: Sequence[ScoreRow]) -> Table:
    """Return the scores as a table for a terminal; smaller is better. The report has more columns."""
    table = Table(title="Scores against held-out images", padding=(0, 1, 0, 0))
    spaces = list(rows[0].scores["spaces"]) if rows else []
    table.add_column("")
    for heading in (
        *(f"{name}\n{space}" for space in spaces for name in ("FD", "KID x1000")),
        *COLUMN_HEADINGS.values(),
    ):
        table.add_column(Text(heading), justify="right", overflow="fold")
    for row in rows:
        label = Text(f"{row.label} *", style="bold") if row.is_default else Text(row.label)
        cells = [cell for space in spaces for cell in _distances(row.scores["spaces"][space], "")]
        table.add_row(label, *cells, *(_number(row.scores[name], 3) for name in COLUMN_HEADINGS))
    if rows:
        table.add_section()
        cells = [cell for space in spaces for cell in _distances(rows[0].scores["spaces"][space], "_floor")]
        rest = [_number(rows[0].scores.get(f"{name}_floor"), 3) for name in COLUMN_HEADINGS]
        table.add_row(Text("real images", style="dim"), *cells, *rest)
        table.caption = "* the default selection   TV: total variation of shares   NN well below 1: memorization"
    return table


COLUMN_HEADINGS = {
    "class_tv": "class\nTV",
    "cluster_share_tv": "cluster\nTV",
    "nn_ratio": "NN\nratio",
    "calls_per_step": "calls\nper step",
}


def _distances(score: dict[str, Any], suffix: str) -> tuple[str, str]:
    return f"{score[f'fd{suffix}']:.4g}", f"{1000 * score[f'kid{suffix}']:.4g}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
