"""Loss curves of all trainings of a run, few points each, on one axis of steps, also while they train."""

from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.pipeline.stage import Stage
from orchestrator.run.metrics_rows import is_number, parse_row, sample_rows
from orchestrator.run.run_folder import RunFolder
from orchestrator.ui.facts.catalog import require_inside

KINDS = ("expert", "monolith", "cluster_conditioned", "distilled_monolith", "router")

POINTS = 256
"""Rows that are read of each file, and steps on the axis."""

HELD_OUT, MAX_SCANNED = b'"held_out"', 2**23
"""What a row with a held-out loss has in it, and how many bytes of a file are looked at."""

Curve = Sequence[tuple[float, float]]


def load_curves(run: RunFolder, graph: Sequence[Stage]) -> dict[str, Any]:
    """Return `steps`, and `series` with a name, a kind, and per step a loss and a held-out loss (None: none there)."""
    curves: dict[str, Curve] = {}
    held_out: dict[str, Curve] = {}
    kinds: dict[str, str] = {}
    for stage in graph:
        path = metrics_file(run, stage) if stage.kind in KINDS else None
        if path is not None:
            rows = sample_rows(path, POINTS)
            if curve := [(row["step"], row["loss"]) for row in rows if is_number(row.get("loss"))]:
                curves[stage.name], kinds[stage.name] = curve, stage.kind
                held_out[stage.name] = read_held_out(path)
    steps = common_steps([*curves.values(), *held_out.values()])
    return {
        "steps": steps,
        "series": [
            {
                "name": name,
                "kind": kinds[name],
                "losses": place_on_steps(curve, steps),
                "held_out": place_on_steps(held_out[name], steps) if held_out[name] else None,
            }
            for name, curve in curves.items()
        ],
    }


def read_held_out(path: Path) -> Curve:
    """Return the held-out losses in a metrics file; few rows have one, so all are looked at, up to `MAX_SCANNED`."""
    with path.open("rb") as file:
        lines = [line for line in file.read(MAX_SCANNED).split(b"\n") if HELD_OUT in line]
    rows = (parse_row(line) for line in lines[:: 1 + len(lines) // POINTS])
    return [(row["step"], row["held_out"]) for row in rows if row is not None and is_number(row.get("held_out"))]


def metrics_file(run: RunFolder, stage: Stage) -> Path | None:
    """Return the metrics of a stage: its artifact's, or its latest attempt's, which has the rows of all; else None."""
    folders = [run.artifact(stage)] if run.is_finished(stage) else run.attempts(stage)[-1:]
    paths = [folder / "metrics.jsonl" for folder in folders]
    return require_inside(run, paths[0]) if paths and paths[0].is_file() else None


def common_steps(curves: Sequence[Curve]) -> list[float]:
    """Return the steps of all curves in rising order; of very many, so many at equal distances up to the last."""
    steps = sorted({step for curve in curves for step, _ in curve})
    if len(steps) <= 2 * POINTS:
        return steps
    return [steps[-1] * number / POINTS for number in range(1, POINTS + 1)]


def place_on_steps(curve: Curve, steps: Sequence[float]) -> list[float | None]:
    """Return a loss for every step: the last one of the curve after the step before, None where it has none."""
    losses: list[float | None] = [None] * len(steps)
    for step, loss in curve:
        losses[min(bisect_left(steps, step), len(steps) - 1)] = loss
    return losses
