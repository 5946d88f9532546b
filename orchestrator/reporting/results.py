"""What a run has found so far, read from its artifacts: the rows of the tables that people see."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from rich.table import Table

from ddm_core.artifacts import read_json, read_manifest
from orchestrator.config.schema import RunConfig
from orchestrator.pipeline.graph import build_graph
from orchestrator.pipeline.stage import Stage, without
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
    """Whether this is what `ddm sample` draws with."""

    @property
    def label(self) -> str:
        """The name, and for `auto` the selection that it stands for."""
        return f"{self.name}: {self.scores['selection']}" if self.name == AUTO else self.name


def current_graph(run: RunFolder, config: RunConfig) -> list[Stage]:
    """The graph of what there is: without the experts that a finished ensemble had to do without."""
    whole = build_graph(config)
    lost = [stage.name for stage in whole if stage.optional and not run.finished(stage)]
    reduced = reduce(without, lost, whole) if len(lost) < config.partition.num_experts else whole
    stands = any(stage.name == "ensemble" and run.finished(stage) for stage in reduced)
    return reduced if stands else whole


def score_rows(run: RunFolder, graph: Sequence[Stage]) -> list[ScoreRow]:
    """Every finished score, the monolith first, then the default selection."""
    stages = [stage for stage in graph if stage.kind == "score" and run.finished(stage)]
    default = next((stage.name for stage in graph if stage.kind == "score"), "")
    rows = [
        ScoreRow(
            name=stage.name.removeprefix("score_"),
            scores=read_json(run.checked(stage, "scores.json")),
            is_default=stage.name == default,
        )
        for stage in stages
    ]
    return sorted(rows, key=lambda row: (row.name != "monolith", not row.is_default))


def selection_choice(run: RunFolder, graph: Sequence[Stage]) -> dict[str, Any] | None:
    """The run's `selection_choice.json`: what `auto` stands for, why, and the candidates; None as long as there is none."""
    stage = next((stage for stage in graph if stage.kind == "selection_search" and run.finished(stage)), None)
    return None if stage is None else dict(read_json(run.checked(stage, "selection_choice.json")))


def training_flops(run: RunFolder, graph: Sequence[Stage]) -> dict[str, float]:
    """FLOPs of every finished stage that belongs to the training of one side or the other; a choice is ours."""
    kinds = ("features", "partition", "expert", "expert_samples", "router", "selection_search", "monolith")
    return {
        stage.name: read_manifest(run.artifact(stage)).flops
        for stage in graph
        if stage.kind in kinds and run.finished(stage)
    }


def score_table(rows: Sequence[ScoreRow]) -> Table:
    """The scores for a terminal, smaller is better; the report has precision, recall and coverage too."""
    table = Table(title="Scores against held-out images", padding=(0, 1, 0, 0))
    spaces = list(rows[0].scores["spaces"]) if rows else []
    table.add_column("")
    for heading in (*(f"{name}\n{space}" for space in spaces for name in ("FD", "KID x1000")), *_HEADINGS.values()):
        table.add_column(heading, justify="right", overflow="fold")
    for row in rows:
        label = f"[bold]{row.label} *[/]" if row.is_default else row.label
        cells = [cell for space in spaces for cell in _distances(row.scores["spaces"][space], "")]
        table.add_row(label, *cells, *(_number(row.scores[name], 3) for name in _HEADINGS))
    if rows:
        table.add_section()
        cells = [cell for space in spaces for cell in _distances(rows[0].scores["spaces"][space], "_floor")]
        rest = [_number(rows[0].scores.get(f"{name}_floor"), 3) for name in _HEADINGS]
        table.add_row("[dim]real images[/]", *cells, *rest)
        table.caption = "* the default selection   TV: total variation of shares   NN < 1: memorising"
    return table


_HEADINGS = {
    "class_tv": "class\nTV",
    "cluster_share_tv": "cluster\nTV",
    "nn_ratio": "NN\nratio",
    "calls_per_step": "calls\na step",
}


def _distances(score: dict[str, Any], suffix: str) -> tuple[str, str]:
    return f"{score[f'fd{suffix}']:.4g}", f"{1000 * score[f'kid{suffix}']:.4g}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
