"""Charts of a run's sections, as inline SVG in the colors of the page."""

from itertools import groupby
from statistics import median
from typing import Any

from markupsafe import Markup

from orchestrator.pipeline.stage import expert_id
from orchestrator.reporting import charts
from orchestrator.reporting.charts import WITH_CLASS, WITHOUT_CLASS
from orchestrator.reporting.facts import LossCurves
from orchestrator.reporting.summary import format_duration
from orchestrator.run.attempts import Attempt

MAX_EXPERTS = 16
"""With more experts, a chart or a table shows them together."""

NOISE_AXIS = "t (0 = clean, 1 = noise)"

Chart = dict[str, Any]
"""`svg`, and a `caption` with the reading rule."""


def draw_losses(losses: LossCurves, y_label: str, description: str) -> Markup | None:
    """Draw a line for each training; many experts become their median and spread."""
    curves, x_label = losses.points, "training step"
    experts = {name: points for name, points in curves.items() if expert_id(name) is not None}
    if len(experts) > MAX_EXPERTS:
        others = {name: points for name, points in curves.items() if name not in experts}
        svg = charts.band_chart(experts, x_label, y_label, f"{len(experts)} experts", others)
    else:
        svg = charts.line_chart(curves, x_label, y_label) if curves else ""
    return charts.themed(svg, description) if svg else None


def describe_extremes(losses: LossCurves) -> str:
    """Return a sentence that names the experts whose loss is highest and lowest at the end; empty for a few experts."""
    last = sorted((points[-1][1], name) for name, points in losses.points.items() if expert_id(name) is not None)
    if len(last) <= MAX_EXPERTS:
        return ""
    lowest, highest = (", ".join(f"{name} ({loss:.3g})" for loss, name in some) for some in (last[:3], last[:-4:-1]))
    return f"At the end the loss is highest for {highest}, and lowest for {lowest}."


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
    experts = [attempt for attempt in attempts if expert_id(attempt.stage) is not None]
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
