"""Results of an analysis as tables for a terminal."""

from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

SURPRISING = 0.001
"""p-value below which an excess of near samples is red; it is small because a table has tens of cells."""

UNKNOWN = "–"

CAPTION = (
    "ratio: mean distance to the nearest training image over that of held-out images; no sign of memorization alone\n"
    "nearer than q %: nearer than the closest q % of them in the same cluster; above expectation is memorization"
)


def audit_tables(audit: dict[str, Any]) -> list[RenderableType]:
    """Return one table for each space, and one of the samples closest to a training image."""
    group = "the expert that generated it" if audit["made_by"] == "draw" else "the cluster that it resembles"
    training = f"Against all {audit['training']:,} training images"
    note = f"{training}; each sample belongs to {group}. In brackets: 95 % interval."
    return [*(_space_table(name, space) for name, space in audit["spaces"].items()), _suspect_table(audit), Text(note)]


def _space_table(name: str, space: dict[str, Any]) -> Table:
    quantiles = [share["quantile"] for share in space["overall"]["shares"]]
    table = Table(title=Text(f"Nearness to the training set, {name}"), padding=(0, 1, 0, 0), show_edge=False)
    for heading in ("expert", "images", "held\nout", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for quantile in quantiles:
        table.add_column(f"nearer\nthan {100 * quantile:g} %", justify="right", no_wrap=True)
        table.add_column("expect", justify="right", no_wrap=True)
    rows = [("all", space["overall"]), *((str(k), row) for k, row in enumerate(space["clusters"]))]
    for label, row in rows:
        ratio = UNKNOWN if row["ratio"] is None else f"{row['ratio']:.3f}"
        cells = [cell for share in row["shares"] for cell in _share_cells(share)] or [UNKNOWN] * 2 * len(quantiles)
        table.add_row(label, f"{row['samples']:,}", f"{row['held_out']:,}", ratio, *cells)
    table.caption = CAPTION
    return table


def _share_cells(share: dict[str, float]) -> tuple[Text, str]:
    text = f"{100 * share['share']:.1f} ({100 * share['low']:.1f}–{100 * share['high']:.1f})"
    is_surprising = share["p_value"] < SURPRISING
    return Text(text, style="red" if is_surprising else ""), f"{100 * share['expected']:.1f}"


def _suspect_table(audit: dict[str, Any]) -> Table:
    table = Table(
        "seed", "expert", "distance", "nearest training image", title="Samples closest to a training image, by pixels"
    )
    for suspect in audit["suspects"]:
        distance = f"{suspect['ratio']:.3f}"
        table.add_row(str(suspect["seed"]), str(suspect["cluster_id"]), distance, Text(suspect["training_key"]))
    table.caption = "distance: divided by the median of the cluster's held-out images"
    return table


def accuracy_table(accuracy: dict[str, Any]) -> Table:
    """Return the accuracy of the ensemble and of every expert on the images of every cluster."""
    table = Table(title=f"Diffusion classifier: accuracy on {sum(accuracy['images']):,} held-out images")
    table.add_column("")
    for cluster in range(len(accuracy["images"])):
        table.add_column(f"cluster {cluster}", justify="right")
    table.add_column("all", justify="right")
    for model, row, overall in zip(accuracy["models"], accuracy["accuracy"], accuracy["overall"], strict=True):
        cluster_of_expert = model.removeprefix("expert_")
        cells = [
            Text(_percent(value), style="bold" if str(k) == cluster_of_expert else "") for k, value in enumerate(row)
        ]
        table.add_row(Text(model), *cells, _percent(overall))
    table.add_section()
    table.add_row(
        Text("most frequent class", style="dim"),
        *map(_percent, accuracy["floor"]),
        f"{_percent(accuracy['chance'])} by chance",
    )
    table.add_row(
        Text("images", style="dim"), *(f"{count:,}" for count in accuracy["images"]), f"{sum(accuracy['images']):,}"
    )
    same_cluster, others = _percent(accuracy["own_cluster"]), _percent(accuracy["other_clusters"])
    table.caption = f"experts on their own cluster {same_cluster}, on others {others}"
    return table


def _percent(value: float | None) -> str:
    return UNKNOWN if value is None else f"{100 * value:.1f} %"
