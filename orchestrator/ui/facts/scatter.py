"""Compressed ensembles as points that can be clicked: size against KID, for an SVG."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orchestrator.pipeline.stage import Stage
from orchestrator.reporting.pareto import CompressionPoint
from orchestrator.run.run_folder import RunFolder

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 760, 400, 56, 46, 16, 24
"""SVG units: of the picture, and of its margins."""

TICKS, LEAST_SPAN = 5, 0.2
"""Ticks of an axis, and the least that it spans, so that equal values look equal."""


LABELS = {"bytes": "bytes on disk", "cpu": "CPU time per image"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """A point and its place."""

    point: CompressionPoint | None
    """None for the original ensemble."""
    cost: float
    x: float
    y: float
    is_front: bool
    score: str
    """Stage with its samples; empty if the present configuration has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scatter:
    """The dots of a chart, and the places and labels of its axes' ticks."""

    label: str
    """Of the x axis."""
    dots: list[Dot]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def draw_scatter(
    points: Sequence[CompressionPoint],
    front: Sequence[CompressionPoint],
    scores: Mapping[Path, str],
    cost: Literal["bytes", "cpu"] = "bytes",
) -> Scatter | None:
    """Place the points whose cost and KID are known, and the original ensemble at (1, 1); None without any."""
    costs = [point.bytes if cost == "bytes" else point.cpu for point in points]
    known = [(p, x, p.kid) for p, x in zip(points, costs, strict=True) if x is not None and p.kid is not None]
    if not known:
        return None
    xs = [math.log2(x) for _, x, _ in known] + [0.0]
    ys = [kid for *_, kid in known] + [1.0]
    x_low, x_high = _widen(min(xs), max(xs))
    y_low, y_high = _widen(min(ys), max(ys))

    def place_x(value: float) -> float:
        return LEFT + (value - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def place_y(value: float) -> float:
        return TOP + (y_high - value) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    dots = [
        Dot(
            point=point,
            cost=x,
            x=place_x(math.log2(x)),
            y=place_y(y),
            is_front=point in front,
            score=scores.get(point.folder, ""),
        )
        for point, x, y in known
    ]
    dots.append(Dot(point=None, cost=1.0, x=place_x(0.0), y=place_y(1.0), is_front=False, score=""))
    steps = [number / (TICKS - 1) for number in range(TICKS)]
    x_values = [x_low + step * (x_high - x_low) for step in steps]
    y_values = [y_low + step * (y_high - y_low) for step in steps]
    return Scatter(
        label=LABELS[cost],
        dots=dots,
        x_ticks=[(place_x(value), f"{2**value:.2g}") for value in x_values],
        y_ticks=[(place_y(value), f"{value:.3g}") for value in y_values],
    )


def scores_by_ensemble(run: RunFolder, graph: Sequence[Stage]) -> dict[Path, str]:
    """Return the name of the first finished score of every ensemble's folder."""
    scores: dict[Path, str] = {}
    for stage in graph:
        if stage.kind == "score" and run.is_finished(stage):
            scores.setdefault(run.artifact(stage.inputs["ensemble"].stage), stage.name)
    return scores


def _widen(low: float, high: float) -> tuple[float, float]:
    margin = max(0.08 * (high - low), (LEAST_SPAN - (high - low)) / 2)
    return low - margin, high + margin
