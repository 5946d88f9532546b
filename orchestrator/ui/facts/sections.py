"""The facts of the sections that the live views and the report share, by the names in their templates."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.pipeline.stage import expert_id
from orchestrator.reporting.costs import CostRow, sum_costs
from orchestrator.reporting.facts import load_audits, load_clusters, load_router_quality
from orchestrator.reporting.pareto import load_compression_points, pareto_front, select_good
from orchestrator.reporting.results import load_training_flops, selection_choice
from orchestrator.reporting.summary import fd_ratio
from orchestrator.reporting.tables.ranking import ScoreRow, rank_rows
from orchestrator.ui.facts.drawings import MAX_EXPERTS, draw_timeline, router_charts
from orchestrator.ui.facts.feature_map import load_classes
from orchestrator.ui.facts.overview import Overview
from orchestrator.ui.facts.pictures import wall_size
from orchestrator.ui.facts.scatter import draw_scatter, scores_by_ensemble
from router.config import AUTO

CHARTS = threading.Lock()
"""Held while matplotlib draws: its settings belong to the process."""


def score_facts(overview: Overview) -> dict[str, Any]:
    """Return the table of scores, why its default is the default, and the audits."""
    run, graph, rows = overview.entry.run, overview.graph, overview.scores
    return {
        "rows": rows,
        "why": explain_default(rows),
        "ranking": rank_rows(rows),
        "selection_search": selection_choice(run, graph),
        "audits": load_audits(run, graph),
        "config": overview.config,
    }


def router_facts(overview: Overview) -> dict[str, Any]:
    """Return the router's quality and calibration over t."""
    quality = load_router_quality(overview.entry.run, overview.graph)
    with CHARTS:
        return {"router_charts": router_charts(quality) if quality else []}


def compression_facts(overview: Overview) -> dict[str, Any]:
    """Return every compressed ensemble, and charts of quality against size and time, each if any point has both."""
    run, graph = overview.entry.run, overview.graph
    points = load_compression_points(run, graph)
    front, scores = pareto_front(points), scores_by_ensemble(run, graph)
    drawn = [draw_scatter(points, front, scores, cost) for cost in ("bytes", "cpu")]
    return {"points": points, "good": select_good(points), "scatters": [chart for chart in drawn if chart]}


def reliability_facts(overview: Overview) -> dict[str, Any]:
    """Return the attempts, when each ran, and what they cost."""
    attempts = overview.current_attempts
    with CHARTS:
        timeline = draw_timeline(attempts) if attempts else None
    return {
        "attempts": attempts,
        "timeline": timeline,
        "costs": merge_costs(overview.costs),
        "total": sum_costs(overview.costs, "whole run"),
    }


def partition_facts(overview: Overview, *, with_pictures: bool) -> dict[str, Any]:
    """Return the clusters and their classes; with a picture of some of each, or the sizes of walls of pictures."""
    if not overview.has_finished("partition"):
        return {"clusters": [], "walls": {}, "classes": {}}
    run, graph = overview.entry.run, overview.graph
    clusters = load_clusters(run, graph, with_pictures=with_pictures)
    walls = {} if with_pictures else {cluster.cluster_id: wall_size(cluster.count) for cluster in clusters}
    return {"clusters": clusters, "walls": walls, "classes": load_classes(run, graph)}


def training_facts(overview: Overview) -> dict[str, Any]:
    """Return the FLOPs of training."""
    return {"flops": list_flops(load_training_flops(overview.entry.run, overview.graph))}


def explain_default(rows: list[ScoreRow]) -> str:
    """Return why the default selection is the default, with this run's own figures."""
    default = next((row for row in rows if row.is_default), None)
    monolith = next((row for row in rows if row.name == "monolith"), None)
    if default is None:
        return ""
    calls = f"{default.scores['calls_per_step']:.2f} expert calls per step"
    if default.name == AUTO:
        return f"The configuration sets auto as the default; in this run it selects {default.scores['selection']}."
    if default.name != "sticky":
        return f"The configuration sets {default.name} as the default; it makes {calls}."
    reason = (
        "Sticky is the default because it is exact in distribution: it draws one expert from p(cluster | condition) "
        f"and keeps it, which is ancestral sampling of the mixture. It makes {calls}."
    )
    ranks = rank_rows(rows).ranks
    if monolith is None or ranks.get("monolith") == ranks.get(default.name):
        return reason
    space = next(iter(default.scores["spaces"]))
    ratio = f"its Fréchet distance in {space} is {fd_ratio(default, monolith):.2f} × the monolith's"
    return f"{reason} In this run {ratio} (one seed)."


def merge_costs(rows: Sequence[CostRow]) -> list[CostRow]:
    """Return the costs of every stage; many experts are summed up in one row."""
    experts = [row for row in rows if expert_id(row.stage) is not None]
    if len(experts) <= MAX_EXPERTS:
        return list(rows)
    merged = sum_costs(experts, f"{len(experts)} experts")
    return [merged if row is experts[0] else row for row in rows if row not in experts[1:]]


def list_flops(flops: Mapping[str, float]) -> dict[str, Any]:
    """Return the FLOPs of every part of the decentralized side, their sum, and the monolith's."""
    parts = {name: value for name, value in flops.items() if name != "monolith"}
    experts = {name: value for name, value in parts.items() if expert_id(name) is not None}
    if len(experts) > MAX_EXPERTS:
        rest = {name: value for name, value in parts.items() if name not in experts}
        parts = {f"{len(experts)} experts": sum(experts.values())} | rest
    return {"parts": parts, "ours": sum(parts.values()), "monolith": flops.get("monolith")}


def audit_rows(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the rows of one space of an audit by expert; of many experts, those with the smallest p."""
    experts = [(str(k), row) for k, row in enumerate(result["clusters"])]
    if len(experts) > MAX_EXPERTS:
        experts.sort(key=lambda pair: min((share["p_value"] for share in pair[1]["shares"]), default=1.0))
    return [("all", result["overall"]), *experts[:MAX_EXPERTS]]
