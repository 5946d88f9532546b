"""Tables and pictures of `benchmarks.accelerate`."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.arms.accelerate_measurements import STEPS, T_STARTS
from benchmarks.record import Listing
from benchmarks.report import Seeds, format_mean, mean_over_seeds

DRAFTS = ("anchors", "autoregressive", "expert", "student")
DISTANCE_KEYS = ("flops", "l2")
STUDENT_KEYS = ("kid", "pixels", "precision", "recall", "vendi")
STUDENT_COLUMNS = ("student, steps", "KID", "FD, pixels", "precision", "recall", "Vendi score")
LABELS = {
    "whole": "original",
    "whole blocks, order 1, interval 4": "block level, order 1, interval 4",
    "of the best": "best of these, all scored images",
    "order 0, own": "order 0, per expert",
    "order 1, own": "order 1, per expert",
}
"""Row labels, where they differ from the keys of the measurements."""


def unet_listings(seeds: Seeds) -> Iterator[Listing]:
    """Yield the table of the U-Net's caches."""
    yield _cache_listing(seeds, "DeepCache on a U-Net of 1.6 M")


def transformer_listings(seeds: Seeds) -> Iterator[Listing]:
    """Yield the tables of the transformer's caches."""
    yield _cache_listing(seeds, "Caches of a transformer of 12 M")
    unions = [name for name in seeds[0] if name.startswith("union")]
    yield Listing(
        title="Adaptive schedules of independent layers, without and with the bubbling union",
        columns=("interval, modules in the union", "FLOPs", "relative L2"),
        rows=[
            (row[0].removeprefix("union ").replace(" ", ", "), *row[1:])
            for row in _mean_rows(seeds, unions, DISTANCE_KEYS)
        ],
    )


def _cache_listing(seeds: Seeds, title: str) -> Listing:
    """Return a table of caches against plain steps at equal FLOPs."""
    names = [name for name, numbers in seeds[0].items() if isinstance(numbers, dict) and "fewer" in numbers]
    return Listing(
        title=f"{title}, {STEPS} Euler steps",
        columns=("cache", "× fewer FLOPs", "relative L2", "plain steps at equal FLOPs", "relative L2 of plain steps"),
        rows=[
            (
                LABELS.get(name, name),
                format_mean([1 / s[name]["flops"] for s in seeds]),
                format_mean([s[name]["l2"] for s in seeds]),
                format_mean([float(s[name]["steps"]) for s in seeds]),
                format_mean([s[name]["fewer"]["l2"] for s in seeds]),
            )
            for name in names
        ],
    )


def route_listings(seeds: Seeds) -> Iterator[Listing]:
    """Yield the table of schedules per expert and shared ones."""
    yield Listing(
        title="Adaptive schedules of eight transformers: per expert, or one for all",
        columns=("order, schedule", "FLOPs", "relative L2", "KID"),
        rows=_mean_rows(seeds, [name for name in seeds[0] if name.startswith("order")], (*DISTANCE_KEYS, "kid")),
    )


def student_listings(seeds: Seeds) -> Iterator[Listing]:
    """Yield the tables of students and drafts."""
    yield _student_listing(seeds, "Students of one transformer of 1.4 M")
    drafts = [name for name, numbers in seeds[0].items() if isinstance(numbers, dict) and name.startswith("draft")]
    yield Listing(
        title="Two steps from a draft (rows without a t: t_start chosen by the search on MMD)",
        columns=("draft, t_start", *STUDENT_COLUMNS[1:-1]),
        rows=_mean_rows(seeds, drafts, STUDENT_KEYS[:-1]),
    )


def late_listings(seeds: Seeds) -> Iterator[Listing]:
    """Yield the table of students that start below t = 1."""
    yield _student_listing(seeds, "The same transformer: students that start below t = 1 and train longer")


def _student_listing(seeds: Seeds, title: str) -> Listing:
    """Return the table of all rows that are not drafts."""
    names = [name for name, numbers in seeds[0].items() if isinstance(numbers, dict) and not name.startswith("draft")]
    return Listing(title=title, columns=STUDENT_COLUMNS, rows=_mean_rows(seeds, names, STUDENT_KEYS))


def cost_listings(seeds: Seeds) -> Iterator[Listing]:
    """Yield the table of pipelines made of eight transformers."""
    names = tested_pipelines(seeds)
    keys = ("flops", "cpu", "bytes", "kid", "pixels", "precision", "recall")
    columns = ("pipeline", "FLOPs", "CPU time", "bytes", "KID", "FD, pixels", "precision", "recall")
    yield Listing(title="Eight transformers of 1.4 M", columns=columns, rows=_mean_rows(seeds, names, keys))


def tested_pipelines(seeds: Seeds) -> list[str]:
    """Return the pipelines that every seed measured; the first seed measured one more, which missed its target."""
    return [name for name, numbers in seeds[0].items() if isinstance(numbers, dict) and all(name in s for s in seeds)]


def _mean_rows(seeds: Seeds, names: Sequence[str], keys: Sequence[str]) -> list[tuple[str, ...]]:
    """Return one row per name: mean and deviation of each key."""
    return [
        (LABELS.get(name, name), *(format_mean([s[name].get(key) for s in seeds]) for key in keys)) for name in names
    ]


def draw_draft_curves(seeds: Seeds, path: Path) -> None:
    """Plot KID over the t from which drafts are refined."""
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for draft in DRAFTS:
        axes.plot(T_STARTS, [_mean_kid(seeds, f"draft {draft} at {t}") for t in T_STARTS], "o-", label=draft)
    for steps, style in ((2, ":"), (16, "--")):
        kid = _mean_kid(seeds, f"plain, {steps}")
        axes.axhline(kid, color="#777777", linestyle=style, label=f"{steps} steps from noise")
    axes.set_xlabel("t from which the draft is refined, in two steps")
    axes.set_ylabel("KID over that of 50 steps")
    axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=8, ncol=2)
    figure.savefig(path, dpi=110)


def draw_cost_front(seeds: Seeds, path: Path) -> None:
    """Plot KID over CPU time of every pipeline made of eight transformers; the Pareto front is colored."""
    figure = Figure(figsize=(8.4, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = [name for name in tested_pipelines(seeds) if name != "whole"]
    points = {name: (_mean_cost(seeds, name), _mean_kid(seeds, name)) for name in names}
    for number, (name, (cost, kid)) in enumerate(sorted(points.items(), key=lambda item: item[1]), start=1):
        is_on_front = not any(c <= cost and k <= kid and (c, k) != (cost, kid) for c, k in points.values())
        axes.plot(cost, kid, "o", color="#c2410c" if is_on_front else "#94a3b8", label=f"{number}  {name}")
        offset = (3, 4) if number % 2 else (3, -10)
        axes.annotate(str(number), (cost, kid), fontsize=7, xytext=offset, textcoords="offset points")
    axes.plot(1, 1, "s", color="#111111", label=f"the ensemble in {STEPS} steps")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("CPU time of an image over the ensemble's (plain steps: FLOPs)")
    axes.set_ylabel("KID over the ensemble's")
    axes.margins(0.1)
    figure.legend(loc="outside right center", frameon=False, fontsize=7)
    figure.savefig(path, dpi=110)


def _mean_kid(seeds: Seeds, name: str) -> float:
    return mean_over_seeds(seeds, lambda s: float(s[name]["kid"]))


def _mean_cost(seeds: Seeds, name: str) -> float:
    """Return the mean CPU time, or FLOPs where the time was not measured."""
    return mean_over_seeds(seeds, lambda s: float(s[name].get("cpu", s[name]["flops"])))
