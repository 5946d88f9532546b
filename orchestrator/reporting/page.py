"""`write_report`: the run folder as one HTML page."""

import base64
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ddm_core.artifacts import to_jsonable, write_text
from orchestrator.config.schema import RunConfig
from orchestrator.controller import project_version
from orchestrator.pipeline.graph import build_graph
from orchestrator.pipeline.stage import Stage
from orchestrator.reporting import charts, facts
from orchestrator.reporting.charts import WITH_CLASS, WITHOUT_CLASS
from orchestrator.reporting.costs import CostRow, format_bytes, load_costs, sum_costs
from orchestrator.reporting.facts import LossCurves
from orchestrator.reporting.pareto import (
    MAX_KID_RATIO,
    CompressionPoint,
    load_compression_points,
    pareto_front,
    select_good,
)
from orchestrator.reporting.results import (
    current_graph,
    load_score_rows,
    load_training_flops,
    selection_choice,
)
from orchestrator.reporting.summary import fd_ratio, format_duration, summary_tiles
from orchestrator.reporting.tables.analysis_tables import SURPRISING
from orchestrator.reporting.tables.ranking import ScoreRow, is_blurred, rank_rows
from orchestrator.run.attempts import Attempt, load_attempts
from orchestrator.run.disk_errors import disk_errors_as_messages
from orchestrator.run.run_folder import RunFolder
from router.config import AUTO

MAX_EXPERTS = 16
"""With more experts, a chart or a table shows them together."""

MAX_NAMES = 8
"""Names in a sentence, before it counts the rest."""

NOISE_AXIS = "t (0 = clean, 1 = noise)"

Chart = dict[str, Any]
"""`svg`, and a `caption` with the reading rule."""


def write_report(run: RunFolder) -> Path:
    """Write `report.html` from whatever is finished, and return its path."""
    config = run.load_config()
    graph = current_graph(run, config)
    page = render_page(_page_facts(run, config, graph))
    with disk_errors_as_messages(run.root):
        write_text(run.report, page)
    return run.report


def render_page(page_facts: dict[str, Any]) -> str:
    """Return `page.html` with its facts filled in; everything but the charts is escaped."""
    templates = create_templates()
    return templates.get_template("page.html").render(**page_facts)


def create_templates(*folders: tuple[str, str]) -> Environment:
    """Return the report's templates and filters; further templates come from (package, folder)."""
    packages = [*folders, ("orchestrator.reporting", "templates")]
    templates = Environment(
        loader=ChoiceLoader([PackageLoader(package, folder) for package, folder in packages]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "data_url": _data_url,
        "si": _si,
        "duration": format_duration,
        "bytes": format_bytes,
        "audit_rows": audit_rows,
    }
    return templates


def _page_facts(run: RunFolder, config: RunConfig, graph: list[Stage]) -> dict[str, Any]:
    rows, points, costs = load_score_rows(run, graph), load_compression_points(run, graph), load_costs(run)
    attempts, total = load_attempts(run, graph), sum_costs(costs, "whole run")
    return {
        "tiles": summary_tiles(rows, total, attempts),
        "rows": rows,
        "why": explain_default(rows),
        "ranking": rank_rows(rows),
        "is_blurred": is_blurred,
        "selection_search": selection_choice(run, graph),
        "points": points,
        "good": select_good(points),
        "max_kid": MAX_KID_RATIO,
        "pareto_charts": pareto_charts(points),
        "grids": _grids(run, graph, rows),
        "audits": facts.load_audits(run, graph),
        "surprising": SURPRISING,
        "attempts": attempts,
        "timeline": draw_timeline(attempts) if attempts else None,
        "costs": merge_costs(costs),
        "total": total,
        **_run_facts(run, config, graph),
        **_training_facts(run, graph),
    }


def _run_facts(run: RunFolder, config: RunConfig, graph: list[Stage]) -> dict[str, Any]:
    """Return the head of the page: the configuration of the run, and what it lacks."""
    present = {stage.name for stage in graph}
    missing = [stage.name for stage in build_graph(config) if stage.name not in present]
    unfinished = [stage.name for stage in graph if not run.is_finished(stage)]
    return {
        "config": config,
        "folder": run.root,
        "yaml": yaml.safe_dump(to_jsonable(config), sort_keys=False),
        "version": project_version(),
        "unfinished": name_some(unfinished),
        "missing": name_some(missing),
        "missing_count": len(missing),
        "missing_share": facts.load_missing_share(run, graph, missing),
    }


def _training_facts(run: RunFolder, graph: list[Stage]) -> dict[str, Any]:
    """Return clusters, losses, quality of the router, and FLOPs of training."""
    has_partition = any(stage.name == "partition" and run.is_finished(stage) for stage in graph)
    quality = facts.load_router_quality(run, graph)
    losses = facts.load_loss_curves(run, graph, ("expert", "monolith", "cluster_conditioned"))
    held_out = facts.load_loss_curves(run, graph, ("expert", "monolith", "cluster_conditioned"), "held_out")
    router_losses = facts.load_loss_curves(run, graph, ("router",))
    return {
        "clusters": facts.load_clusters(run, graph) if has_partition else [],
        "loss_chart": _loss_chart(losses, "loss", "Training loss by step"),
        "held_out_chart": _loss_chart(held_out, "held-out loss", "Held-out loss by step"),
        "loss_note": describe_extremes(losses),
        "damaged": name_some([*losses.damaged, *router_losses.damaged]),
        "router_loss_chart": _loss_chart(router_losses, "cross-entropy (nats)", "Training loss of the router by step"),
        "router_charts": router_charts(quality) if quality else [],
        "flops": _flops_table(load_training_flops(run, graph)),
    }


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


def _grids(run: RunFolder, graph: list[Stage], rows: list[ScoreRow]) -> list[tuple[str, bytes]]:
    """Return title and PNG of the default selection's and the monolith's samples from the same seeds."""
    by_name = {stage.name: stage for stage in graph}
    shown = [row for row in rows if row.is_default] + [row for row in rows if row.name == "monolith"]
    return [
        (
            "Monolith" if row.name == "monolith" else f"Ensemble, {row.label}",
            run.verify_file(by_name[f"score_{row.name}"], "grid.png").read_bytes(),
        )
        for row in shown
    ]


def name_some(names: Sequence[str]) -> str:
    """Return names as a list in a sentence; the last of many are only counted."""
    rest = len(names) - MAX_NAMES
    return ", ".join(names) if rest < 2 else f"{', '.join(names[:MAX_NAMES])} and {rest} more"


def is_expert(name: str) -> bool:
    """Return whether a stage's name is that of an expert."""
    return name.startswith("expert_") and name.removeprefix("expert_").isdecimal()


def merge_costs(rows: Sequence[CostRow]) -> list[CostRow]:
    """Return the costs of every stage; many experts are summed up in one row."""
    experts = [row for row in rows if is_expert(row.stage)]
    if len(experts) <= MAX_EXPERTS:
        return list(rows)
    merged = sum_costs(experts, f"{len(experts)} experts")
    return [merged if row is experts[0] else row for row in rows if row not in experts[1:]]


def describe_extremes(losses: LossCurves) -> str:
    """Return a sentence that names the experts whose loss is highest and lowest at the end; empty for a few experts."""
    last = sorted((points[-1][1], name) for name, points in losses.points.items() if is_expert(name))
    if len(last) <= MAX_EXPERTS:
        return ""
    lowest, highest = (", ".join(f"{name} ({loss:.3g})" for loss, name in some) for some in (last[:3], last[:-4:-1]))
    return f"At the end the loss is highest for {highest}, and lowest for {lowest}."


def _loss_chart(losses: LossCurves, y_label: str, description: str) -> Markup | None:
    """Draw a line for each training; many experts become their median and spread."""
    curves, x_label = losses.points, "training step"
    experts = {name: points for name, points in curves.items() if is_expert(name)}
    if len(experts) > MAX_EXPERTS:
        others = {name: points for name, points in curves.items() if name not in experts}
        svg = charts.band_chart(experts, x_label, y_label, f"{len(experts)} experts", others)
    else:
        svg = charts.line_chart(curves, x_label, y_label) if curves else ""
    return charts.themed(svg, description) if svg else None


def pareto_charts(points: list[CompressionPoint]) -> list[Markup]:
    """Return KID against bytes and against CPU time, each if any point has both."""
    front = pareto_front(points)
    labels = {"bytes": "bytes on disk", "cpu": "CPU time per image"}
    drawn = {label: charts.pareto_chart(points, front, cost, label) for cost, label in labels.items()}
    return [charts.themed(svg, f"KID against {label} of every ensemble") for label, svg in drawn.items() if svg]


def router_charts(quality: dict[str, Any]) -> list[Chart]:
    """Return cross-entropy, accuracy and calibration over t, each with its floor.

    The floor of the first two is the prior, which is all that is known at t = 1; that of the third is chance.
    """
    cross_entropy = _prior_chart(quality, "cross_entropy", "cross-entropy (nats)", "prior_entropy", "prior's entropy")
    accuracy = _prior_chart(quality, "accuracy", "accuracy", "largest_share", "share of largest cluster")
    drawn = (
        (
            "Cross-entropy of the router over t",
            cross_entropy,
            "Lower is better; a solid line above its dashed line is worse than knowing only the clusters' sizes.",
        ),
        (
            "Accuracy of the router over t",
            accuracy,
            "Higher is better; a solid line below its dashed line is worse than always naming the largest cluster.",
        ),
        (
            "Calibration error of the router over t",
            _calibration_chart(quality["bins"]),
            "Lower is better; a solid line far above its dashed line means over- or underconfident gates.",
        ),
    )
    return [{"svg": charts.themed(svg, title), "caption": caption} for title, svg, caption in drawn]


def _prior_chart(quality: dict[str, Any], name: str, label: str, floor: str, floor_label: str) -> str:
    """Draw a quantity over t with and without the class label, and what the prior alone reaches."""
    return charts.line_chart(
        {
            WITH_CLASS: _over_t(quality["bins"], name),
            WITHOUT_CLASS: _over_t(quality["bins"], f"{name}_null"),
        },
        NOISE_AXIS,
        label,
        {
            f"{floor_label}, {WITH_CLASS}": quality[floor],
            f"{floor_label}, {WITHOUT_CLASS}": quality[f"{floor}_null"],
        },
    )


def _calibration_chart(bins: list[dict[str, float]]) -> str:
    return charts.line_chart(
        {
            WITH_CLASS: _over_t(bins, "calibration_error"),
            WITHOUT_CLASS: _over_t(bins, "calibration_error_null"),
            f"{WITHOUT_CLASS}, uncalibrated": _over_t(bins, "calibration_error_before_null"),
        },
        NOISE_AXIS,
        "expected calibration error",
        {
            f"perfect calibration, {WITH_CLASS}": _over_t(bins, "calibration_error_floor"),
            f"perfect calibration, {WITHOUT_CLASS}": _over_t(bins, "calibration_error_floor_null"),
        },
    )


def _over_t(bins: list[dict[str, float]], name: str) -> list[tuple[float, float]]:
    return [((row["t_low"] + row["t_high"]) / 2, row[name]) for row in bins]


def draw_timeline(attempts: list[Attempt]) -> Markup:
    """Draw when each attempt ran; many experts share a bar for each state."""
    first = min(attempt.start for attempt in attempts)
    experts = [attempt for attempt in attempts if is_expert(attempt.stage)]
    if len(experts) > MAX_EXPERTS:
        attempts = [attempt for attempt in attempts if attempt not in experts]
    bars = [
        (
            f"{attempt.stage} #{attempt.attempt} · {_place(attempt)}",
            attempt.stage,
            attempt.start - first,
            attempt.end - first,
            attempt.state,
        )
        for attempt in attempts
    ]
    if len(experts) > MAX_EXPERTS:
        bars = sorted([*bars, *_expert_bars(experts, first)], key=lambda bar: bar[2])
    return charts.themed(charts.timeline(bars), "When each attempt ran, and where")


def _expert_bars(experts: list[Attempt], first: float) -> list[tuple[str, str, float, float, str]]:
    """Return one bar for each state of the attempts of many experts, from the first start to the last end."""
    bars = []
    for state, same in groupby(sorted(experts, key=lambda attempt: attempt.state), key=lambda attempt: attempt.state):
        group = list(same)
        typical = format_duration(median(attempt.seconds for attempt in group))
        label = f"{len(group)} attempts of experts, median {typical}"
        start, end = min(attempt.start for attempt in group), max(attempt.end for attempt in group)
        bars.append((label, "expert_0", start - first, end - first, state))
    return bars


def _place(attempt: Attempt) -> str:
    return f"{attempt.island} · {attempt.place}" if attempt.island else attempt.place


def _flops_table(flops: Mapping[str, float]) -> dict[str, Any]:
    """Return the FLOPs of every part of the decentralized side, their sum, and the monolith's."""
    parts = {name: value for name, value in flops.items() if name != "monolith"}
    experts = {name: value for name, value in parts.items() if is_expert(name)}
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


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _si(value: float) -> str:
    """Return a number with a metric prefix: 1.23 T."""
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.2f} {prefix}"
    return f"{value:.0f}"
