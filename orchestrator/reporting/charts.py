"""Charts of the report, as SVG text; the one file that imports matplotlib."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from orchestrator.reporting.pareto import CompressionPoint

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0")
MONOLITH = "#555555"

STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "legend.frameon": False,
}

Curve = Sequence[tuple[float, float]]


def colour_of(name: str) -> str:
    """One colour for every expert wherever it appears; the monolith and the router have their own."""
    if name.startswith("expert_"):
        return COLOURS[int(name.removeprefix("expert_")) % len(COLOURS)]
    return {"monolith": MONOLITH, "router": "#a463f2", "with the class": COLOURS[0], "without": COLOURS[2]}.get(
        name, "#9498a0"
    )


def line_chart(
    curves: Mapping[str, Curve], x_label: str, y_label: str, floors: Mapping[str, float | Curve] | None = None
) -> str:
    """Lines over a common axis; `floors` are dashed, and horizontal if they are numbers, named in the legend."""
    with _figure(5.4, 3.0) as (axes, svg):
        for name, points in curves.items():
            axes.plot(*zip(*points, strict=True), label=name, color=colour_of(name), linewidth=1.6)
        for name, level in (floors or {}).items():
            colour = colour_of(name.rpartition(", ")[2])
            if isinstance(level, float | int):
                axes.axhline(level, label=name, color=colour, linestyle="--", linewidth=1)
            else:
                axes.plot(*zip(*level, strict=True), label=name, color=colour, linestyle="--", linewidth=1)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.legend(fontsize=8, ncols=2)
    return svg.getvalue()


def timeline(bars: Sequence[tuple[str, str, float, float, str]]) -> str:
    """Who ran when: (row, colour name, start s, end s, note) bars; what did not finish is hatched."""
    rows = list(dict.fromkeys(bar[0] for bar in bars))
    with _figure(9.4, 0.8 + 0.28 * len(rows)) as (axes, svg):
        for row, name, start, end, note in bars:
            finished = note == "finished"
            axes.barh(
                row,
                max(end - start, 0.05),
                left=start,
                height=0.7,
                color=colour_of(name),
                alpha=1.0 if finished else 0.45,
                hatch=None if finished else "///",
            )
            axes.text(
                end,
                rows.index(row),
                f" {end - start:.1f} s" + ("" if finished else f" ({note})"),
                va="center",
                fontsize=8,
            )
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("seconds since the first attempt")
    return svg.getvalue()


def trial_chart(scores: Sequence[tuple[float, float]], metric: str, *, maximize: bool) -> str:
    """A sweep's (trial number, score) as dots, and the best one so far as steps."""
    numbers, values = zip(*scores, strict=True)
    best = list(accumulate(values, max if maximize else min))
    with _figure(7.0, 3.0) as (axes, svg):
        axes.plot(numbers, values, "o", color=COLOURS[0], markersize=4, label="trial")
        axes.step(numbers, best, where="post", color=COLOURS[2], linewidth=1.4, label="best so far")
        axes.set_xlabel("trial")
        axes.set_ylabel(metric)
        axes.legend(fontsize=8)
    return svg.getvalue()


def pareto_chart(points: Sequence[CompressionPoint], front: Sequence[CompressionPoint]) -> str:
    """Bytes and processor time against KID, as ratios to the whole ensemble, which is the star; the front is filled."""
    costs = (("bytes", "bytes"), ("cpu", "CPU time of an image"))
    with _figures(10.4, 3.6, len(costs)) as (axes, svg):
        for plane, (key, label) in zip(axes, costs, strict=True):
            plane.plot(1, 1, "*", color=MONOLITH, markersize=12)
            for number, point in enumerate(points):
                cost = getattr(point, key)
                if cost is None or point.kid is None:
                    continue
                colour = COLOURS[number % len(COLOURS)]
                face = colour if point in front else "none"
                plane.plot(cost, point.kid, "o", color=colour, markerfacecolor=face, label=point.name)
            plane.set_xlabel(f"{label}, to the whole ensemble's")
            plane.set_ylabel("KID, to the whole ensemble's")
            plane.set_xscale("log")
            plane.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            plane.xaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
            plane.tick_params(axis="x", which="both", labelsize=7)
        axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return svg.getvalue()


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Axes, io.StringIO]]:
    """One pair of axes to draw on; the SVG is in the buffer once the block has ended."""
    with _figures(width, height, 1) as (axes, svg):
        yield axes[0], svg


@contextmanager
def _figures(width: float, height: float, columns: int) -> Iterator[tuple[list[Axes], io.StringIO]]:
    """The same with several pairs of axes beside each other."""
    svg = io.StringIO()
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield [figure.add_subplot(1, columns, number + 1) for number in range(columns)], svg
        figure.savefig(svg, format="svg", metadata={"Date": None})
