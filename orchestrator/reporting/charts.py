"""Charts of the report, as SVG text; the only file that imports matplotlib.

The page draws its charts in the colors of the reader's theme: `themed` replaces the neutral colors by CSS variables.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate

import numpy as np
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from orchestrator.pipeline.stage import expert_id

COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0")
INK, MUTED, GRID = "#1c2126", "#575f68", "#e2e6ea"

WITH_CLASS, WITHOUT_CLASS = "with class", "without class"

SERIES_COLORS = {"monolith": MUTED, "router": COLORS[6], WITH_CLASS: COLORS[0], WITHOUT_CLASS: COLORS[2]}

THEME = {INK: "--chart-ink", MUTED: "--chart-muted", GRID: "--chart-grid"}
"""CSS variables of the page, by the color that they replace."""

STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "hatch.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "legend.frameon": False,
    "legend.fontsize": 8,
}

WIDTH, HEIGHT, LEGEND_ROW = 4.7, 2.7, 0.17
"""Inches: of a chart in a column of the page, and of one row of its legend below."""

BAND_POINTS = 200
"""Steps at which the quantiles over many curves are drawn."""

Curve = Sequence[tuple[float, float]]


def series_color(name: str) -> str:
    """Return the color of an expert, of the monolith, of the router, or of a line with that name: always the same."""
    if (k := expert_id(name)) is not None:
        return COLORS[k % len(COLORS)]
    return SERIES_COLORS.get(name, COLORS[9])


def line_chart(
    curves: Mapping[str, Curve], x_label: str, y_label: str, floors: Mapping[str, float | Curve] | None = None
) -> str:
    """Draw lines over common axes; `floors` are dashed, and horizontal if they are numbers. All are in the legend."""
    legend_rows = (len(curves) + len(floors or {}) + 1) // 2
    with _figure(WIDTH, HEIGHT + LEGEND_ROW * legend_rows) as (axes, svg):
        for name, points in curves.items():
            axes.plot(*zip(*points, strict=True), label=name, color=series_color(name), linewidth=1.6)
        for name, level in (floors or {}).items():
            color = series_color(name.rpartition(", ")[2])
            if isinstance(level, float | int):
                axes.axhline(level, label=name, color=color, linestyle="--", linewidth=1)
            else:
                axes.plot(*zip(*level, strict=True), label=name, color=color, linestyle="--", linewidth=1)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        _add_legend(axes, columns=2)
    return svg.getvalue()


def band_chart(curves: Mapping[str, Curve], x_label: str, y_label: str, name: str, lines: Mapping[str, Curve]) -> str:
    """Draw the median and the spread of many curves, which the legend calls `name`, and a few other lines."""
    arrays = [np.array(points, dtype=float).T for points in curves.values()]
    steps = np.linspace(max(array[0, 0] for array in arrays), max(array[0, -1] for array in arrays), BAND_POINTS)
    values = np.array([np.interp(steps, xs, ys, right=np.nan) for xs, ys in arrays])
    low, low_10, middle, high_10, high = np.nanquantile(values, (0, 0.1, 0.5, 0.9, 1), axis=0)
    with _figure(WIDTH, HEIGHT + LEGEND_ROW * (len(lines) + 4) // 2) as (axes, svg):
        axes.fill_between(steps, low, high, color=COLORS[0], alpha=0.15, linewidth=0, label="lowest to highest")
        axes.fill_between(steps, low_10, high_10, color=COLORS[0], alpha=0.35, linewidth=0, label="10 % to 90 %")
        axes.plot(steps, middle, color=COLORS[0], linewidth=1.6, label=f"median of {name}")
        for line_name, points in lines.items():
            axes.plot(*zip(*points, strict=True), label=line_name, color=series_color(line_name), linewidth=1.6)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        _add_legend(axes, columns=2)
    return svg.getvalue()


def timeline(bars: Sequence[tuple[str, str, float, float, str]]) -> str:
    """Draw (row, series, start s, end s, state) bars; those of unfinished attempts are hatched."""
    rows = list(dict.fromkeys(bar[0] for bar in bars))
    with _figure(10.0, 0.8 + 0.28 * len(rows)) as (axes, svg):
        for row, name, start, end, state in bars:
            finished = state == "finished"
            axes.barh(
                row,
                max(end - start, 0.05),
                left=start,
                height=0.7,
                color=series_color(name),
                alpha=1.0 if finished else 0.45,
                hatch=None if finished else "///",
            )
            label = f" {end - start:.1f} s" + ("" if finished else f" ({state})")
            axes.text(end, rows.index(row), label, va="center", fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("seconds since the first attempt")
    return svg.getvalue()


def trial_chart(scores: Sequence[tuple[float, float]], metric: str, *, maximize: bool) -> str:
    """Draw a sweep's (trial number, score) as dots, and the best score so far as steps."""
    numbers, values = zip(*scores, strict=True)
    best = list(accumulate(values, max if maximize else min))
    with _figure(7.0, 3.0) as (axes, svg):
        axes.plot(numbers, values, "o", color=COLORS[0], markersize=4, label="trial")
        axes.step(numbers, best, where="post", color=COLORS[2], linewidth=1.4, label="best so far")
        axes.set_xlabel("trial")
        axes.set_ylabel(metric)
        axes.legend()
    return svg.getvalue()


def themed(svg: str, description: str) -> Markup:
    """Return a chart as an inline element: transparent, in the page's colors, with a description for screen readers.

    Only ids that something refers to stay, because a page holds several charts and ids must be unique.
    """
    drawing = svg[svg.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>\s*", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r'(<g id="patch_1">\s*<path [^>]*style=")fill: #ffffff', r"\1fill: none", drawing)
    drawing = re.sub(
        r'(<g id="axes_1">\s*<g id="patch_\d+">\s*<path [^>]*style=")fill: #ffffff', r"\1fill: none", drawing
    )
    referenced = set(re.findall(r"#([A-Za-z][\w.-]*)[\")]", drawing))
    drawing = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in referenced else "", drawing)
    for color, variable in THEME.items():
        drawing = drawing.replace(color, f"var({variable}, {color})")
    return Markup(drawing.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1))  # noqa: S704


def _add_legend(axes: Axes, columns: int) -> None:
    """Put the legend below the axes, where it covers no line."""
    figure = axes.get_figure()
    if figure is not None:
        figure.legend(loc="outside lower center", ncols=columns)


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Axes, io.StringIO]]:
    """Yield axes to draw on; the buffer holds the SVG once the block has ended."""
    svg = io.StringIO()
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure.add_subplot(), svg
        figure.savefig(svg, format="svg", metadata={"Date": None})
