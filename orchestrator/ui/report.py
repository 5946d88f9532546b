"""`write_report`: the views of a run as one HTML file that needs no server."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ddm_core.artifacts import read_small_file, to_jsonable, write_text
from orchestrator.pipeline.graph import build_graph
from orchestrator.reporting import facts
from orchestrator.run.disk_errors import disk_errors_as_messages
from orchestrator.run.run_folder import RunFolder
from orchestrator.ui.facts.catalog import RunEntry, require_inside
from orchestrator.ui.facts.drawings import describe_extremes, draw_losses
from orchestrator.ui.facts.overview import Overview, load_overview
from orchestrator.ui.facts.pipeline_graph import BOX_WIDTH, draw_graph
from orchestrator.ui.facts.samples import load_conditions
from orchestrator.ui.facts.sections import (
    compression_facts,
    partition_facts,
    reliability_facts,
    router_facts,
    score_facts,
    training_facts,
)
from orchestrator.ui.facts.trajectories import load_trajectories
from orchestrator.ui.templating import STYLE, create_templates, data_url

MAX_NAMES = 8
"""Names in a sentence, before it counts the rest; experts whose last pictures are shown."""

MAX_PICTURE_BYTES = 2**19
"""A larger picture of an expert alone is left to the page."""

SHOWN_TRAJECTORIES = 2

TRAININGS = ("expert", "monolith", "cluster_conditioned")


def write_report(run: RunFolder) -> Path:
    """Write `report.html` from whatever is finished, and return its path."""
    page = render_report(report_facts(load_overview(RunEntry(key="", run=run))))
    with disk_errors_as_messages(run.root):
        write_text(run.report, page)
    return run.report


def render_report(facts: dict[str, Any]) -> str:
    """Return the report with its facts filled in; everything but the charts is escaped."""
    style = STYLE.read_text(encoding="utf-8")
    return create_templates().get_template("report.html").render(**facts, is_static=True, style=style)


def report_facts(overview: Overview) -> dict[str, Any]:
    """Return everything that the report shows of a run."""
    kept = load_trajectories(overview.entry.run, overview.gallery_stage) if overview.gallery else None
    return {
        "overview": overview,
        "drawing": draw_graph(overview.graph, overview.rows),
        "box_width": BOX_WIDTH,
        "grids": _grids(overview),
        "films": kept.films(lambda *place: data_url(kept.png(*place)), SHOWN_TRAJECTORIES) if kept else [],
        "conditions": load_conditions(overview.entry.run, overview.graph, overview.gallery_stage) if kept else {},
        **_head_facts(overview),
        **score_facts(overview),
        **compression_facts(overview),
        **partition_facts(overview, with_pictures=True),
        **_training_facts(overview),
        **router_facts(overview),
        **reliability_facts(overview),
        "step_samples": _last_step_samples(overview),
    }


def _head_facts(overview: Overview) -> dict[str, Any]:
    """Return the configuration of the run, and what it lacks."""
    run, graph = overview.entry.run, overview.graph
    present = {stage.name for stage in graph}
    missing = [stage.name for stage in build_graph(overview.config) if stage.name not in present]
    return {
        "yaml": yaml.safe_dump(to_jsonable(overview.config), sort_keys=False),
        "unfinished": name_some([row.name for row in overview.rows if row.state != "finished"]),
        "missing": name_some(missing),
        "missing_count": len(missing),
        "missing_share": facts.load_missing_share(run, graph, missing),
    }


def _training_facts(overview: Overview) -> dict[str, Any]:
    """Return the losses and the FLOPs of training."""
    run, graph = overview.entry.run, overview.graph
    losses = facts.load_loss_curves(run, graph, TRAININGS)
    held_out = facts.load_loss_curves(run, graph, TRAININGS, "held_out")
    router_losses = facts.load_loss_curves(run, graph, ("router",))
    return {
        "loss_chart": draw_losses(losses, "loss", "Training loss by step"),
        "held_out_chart": draw_losses(held_out, "held-out loss", "Held-out loss by step"),
        "loss_note": describe_extremes(losses),
        "damaged": name_some([*losses.damaged, *router_losses.damaged]),
        "router_loss_chart": draw_losses(router_losses, "cross-entropy (nats)", "Training loss of the router by step"),
        **training_facts(overview),
    }


def _grids(overview: Overview) -> list[tuple[str, bytes]]:
    """Return title and PNG of the default selection's and the monolith's samples from the same seeds."""
    rows = overview.scores
    shown = [row for row in rows if row.is_default] + [row for row in rows if row.name == "monolith"]
    return [
        (
            "Monolith" if row.name == "monolith" else f"Ensemble, {row.label}",
            overview.entry.run.verify_file(overview.stage(f"score_{row.name}"), "grid.png").read_bytes(),
        )
        for row in shown
    ]


def _last_step_samples(overview: Overview) -> list[tuple[str, bytes]]:
    """Return a label and the PNG of what some experts drew last while they trained; large ones are on the page only."""
    run, found = overview.entry.run, list(overview.step_samples.items())[:MAX_NAMES]
    last = [(name, samples[-1], require_inside(run, samples[-1].picture)) for name, samples in found]
    return [
        (f"{name}, {samples.label}", read_small_file(path))
        for name, samples, path in last
        if path.stat().st_size <= MAX_PICTURE_BYTES
    ]


def name_some(names: Sequence[str]) -> str:
    """Return names as a list in a sentence; the last of many are only counted."""
    rest = len(names) - MAX_NAMES
    return ", ".join(names) if rest < 2 else f"{', '.join(names[:MAX_NAMES])} and {rest} more"
