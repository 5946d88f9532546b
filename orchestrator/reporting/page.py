"""`write_report`: the run folder as one HTML page."""

import base64
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from ddm_core.artifacts import to_jsonable, write_text
from orchestrator.config.schema import RunConfig
from orchestrator.controller import project_version
from orchestrator.pipeline.graph import build_graph
from orchestrator.pipeline.stage import Stage
from orchestrator.reporting import charts, facts
from orchestrator.reporting.costs import cost_rows, size, total
from orchestrator.reporting.pareto import compression_points, front_of
from orchestrator.reporting.progress import clock
from orchestrator.reporting.results import ScoreRow, current_graph, score_rows, selection_choice, training_flops
from orchestrator.run.attempts import Attempt, attempts_of
from orchestrator.run.disk_errors import disk_errors_as_messages
from orchestrator.run.run_folder import RunFolder
from router.config import AUTO


def write_report(run: RunFolder) -> Path:
    """Write `report.html` from whatever is finished, and return its path."""
    config = run.load_config()
    graph = current_graph(run, config)
    templates = Environment(
        loader=PackageLoader("orchestrator.reporting", "."), autoescape=True, undefined=StrictUndefined
    )
    templates.filters |= {"data_url": _data_url, "si": _si, "clock": clock, "size": size}
    page = templates.get_template("page.html").render(**_page_facts(run, config, graph))
    with disk_errors_as_messages(run.root):
        write_text(run.report, page)
    return run.report


def _page_facts(run: RunFolder, config: RunConfig, graph: list[Stage]) -> dict[str, Any]:
    finished = {stage.name for stage in graph if run.finished(stage)}
    rows = score_rows(run, graph)
    attempts, costs = attempts_of(run, graph), cost_rows(run)
    quality = facts.router_quality(run, graph)
    standing = {stage.name for stage in graph}
    points = compression_points(run, graph)
    missing = [stage.name for stage in build_graph(config) if stage.name not in standing]
    return {
        "config": config,
        "yaml": yaml.safe_dump(to_jsonable(config), sort_keys=False),
        "version": project_version(),
        "unfinished": [stage.name for stage in graph if stage.name not in finished],
        "missing": missing,
        "missing_share": facts.missing_share(run, graph, missing),
        "audits": facts.audit_facts(run, graph),
        "rows": rows,
        "why": explain_default(rows),
        "selection_search": selection_choice(run, graph),
        "points": points,
        "front": front_of(points),
        "pareto_chart": charts.pareto_chart(points, front_of(points)) if points else "",
        "grids": _grids(run, graph, rows),
        "clusters": facts.cluster_facts(run, graph) if "partition" in finished else [],
        "loss_chart": _chart(
            facts.loss_curves(run, graph, ("expert", "monolith", "cluster_conditioned")), "step", "loss"
        ),
        "router_loss_chart": _chart(facts.loss_curves(run, graph, ("router",)), "step", "cross-entropy (nats)"),
        "router_charts": _router_charts(quality) if quality else [],
        "attempts": attempts,
        "timeline": _timeline(attempts) if attempts else "",
        "costs": costs,
        "total": total(costs, "everything"),
        "flops": _flops_table(training_flops(run, graph)),
    }


def explain_default(rows: list[ScoreRow]) -> str:
    """Why the default selection is the default, with this run's own figures."""
    default = next((row for row in rows if row.is_default), None)
    monolith = next((row for row in rows if row.name == "monolith"), None)
    if default is None:
        return ""
    calls = f"{default.scores['calls_per_step']:.2f} expert call(s) a step"
    if default.name == AUTO:
        return f"auto is the default because the configuration says so; it stands for {default.scores['selection']}."
    if default.name != "sticky":
        return f"{default.name} is the default because the configuration says so; it makes {calls}."
    reason = (
        "sticky is the default because it is exact in distribution (one expert is drawn from p(cluster | condition) "
        f"and kept, which is ancestral sampling of the mixture) and makes {calls}."
    )
    if monolith is None:
        return reason
    ratios = [
        f"{default.scores['spaces'][space]['fd'] / values['fd']:.2f} in {space}"
        for space, values in monolith.scores["spaces"].items()
    ]
    return f"{reason} Its Fréchet distance is {' and '.join(ratios)} times the monolith's in this run (one seed)."


def _grids(run: RunFolder, graph: list[Stage], rows: list[ScoreRow]) -> list[tuple[str, bytes]]:
    """The default selection and the monolith, drawn from the same seeds."""
    by_name = {stage.name: stage for stage in graph}
    shown = [row for row in rows if row.is_default] + [row for row in rows if row.name == "monolith"]
    titles = {"monolith": "monolith"}
    return [
        (
            titles.get(row.name, f"ensemble, {row.label}"),
            run.checked(by_name[f"score_{row.name}"], "grid.png").read_bytes(),
        )
        for row in shown
    ]


def _chart(curves: dict[str, list[tuple[float, float]]], x_label: str, y_label: str) -> str:
    return charts.line_chart(curves, x_label, y_label) if curves else ""


def _router_charts(quality: dict[str, Any]) -> list[str]:
    """Cross-entropy, accuracy and calibration over t, each beside its floor.

    The floor of the first two is the prior, which is all that is known at t = 1; that of the third is chance.
    """
    labels = {
        "cross_entropy": ("cross-entropy (nats)", "prior_entropy", "entropy of the prior"),
        "accuracy": ("accuracy", "largest_share", "share of the largest cluster"),
    }
    return [
        charts.line_chart(
            {
                "with the class": _over_t(quality["bins"], name),
                "without": _over_t(quality["bins"], f"{name}_null"),
            },
            "t (0 clean, 1 noise)",
            label,
            {f"{floor_label}, with the class": quality[floor], f"{floor_label}, without": quality[f"{floor}_null"]},
        )
        for name, (label, floor, floor_label) in labels.items()
    ] + [_calibration_chart(quality["bins"])]


def _calibration_chart(bins: list[dict[str, float]]) -> str:
    return charts.line_chart(
        {
            "with the class": _over_t(bins, "calibration_error"),
            "without": _over_t(bins, "calibration_error_null"),
            "without, before calibration": _over_t(bins, "calibration_error_before_null"),
        },
        "t (0 clean, 1 noise)",
        "expected calibration error",
        {
            "perfectly calibrated, with the class": _over_t(bins, "calibration_error_floor"),
            "perfectly calibrated, without": _over_t(bins, "calibration_error_floor_null"),
        },
    )


def _over_t(bins: list[dict[str, float]], name: str) -> list[tuple[float, float]]:
    return [((row["t_low"] + row["t_high"]) / 2, row[name]) for row in bins]


def _timeline(attempts: list[Attempt]) -> str:
    first = min(attempt.start for attempt in attempts)
    return charts.timeline(
        [
            (
                f"{attempt.stage} #{attempt.attempt} · {_place(attempt)}",
                attempt.stage,
                attempt.start - first,
                attempt.end - first,
                attempt.state,
            )
            for attempt in attempts
        ]
    )


def _place(attempt: Attempt) -> str:
    return f"{attempt.island} · {attempt.place}" if attempt.island else attempt.place


def _flops_table(flops: dict[str, float]) -> dict[str, Any]:
    """FLOPs of every part, and the two sums that must match."""
    ours = {name: value for name, value in flops.items() if name != "monolith"}
    return {"parts": flops, "ours": sum(ours.values()), "monolith": flops.get("monolith")}


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _si(value: float) -> str:
    """A number with a metric prefix: 1.23 T."""
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.2f} {prefix}"
    return f"{value:.0f} "
