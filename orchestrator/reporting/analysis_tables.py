"""What an examination found, for a terminal."""

from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

SURPRISING = 0.001
"""Chance below which an excess of near samples is shown in red; a table has tens of cells."""

UNKNOWN = "–"

CAPTION = (
    "NN ratio: distance to the nearest training image over that of held-out images\n"
    "nearer than q %: than q % of those of its cluster are; above expectation is memorising"
)


def audit_tables(found: dict[str, Any]) -> list[RenderableType]:
    """One table for each space, and the samples that are nearest to a training image."""
    made = "the expert that was drawn for it" if found["made_by"] == "draw" else "the cluster that it looks like"
    how = f"Against all {found['training']:,} training images; each sample counts for {made}. In brackets: 95 %."
    return [*(_space_table(name, space) for name, space in found["spaces"].items()), _suspect_table(found), Text(how)]


def _space_table(name: str, space: dict[str, Any]) -> Table:
    quantiles = [share["quantile"] for share in space["overall"]["shares"]]
    table = Table(title=f"Nearness to the training set, {name}", padding=(0, 1, 0, 0), show_edge=False)
    for heading in ("expert", "images", "held\nout", "NN\nratio"):
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


def _share_cells(share: dict[str, float]) -> tuple[str, str]:
    said = f"{100 * share['share']:.1f} ({100 * share['low']:.1f}–{100 * share['high']:.1f})"
    is_surprising = share["p_value"] < SURPRISING
    return (f"[red]{said}[/]" if is_surprising else said), f"{100 * share['expected']:.1f}"


def _suspect_table(found: dict[str, Any]) -> Table:
    table = Table("seed", "expert", "distance", "nearest training image", title="Nearest samples, by pixels")
    for suspect in found["suspects"]:
        distance = f"{suspect['ratio']:.3f}"
        table.add_row(str(suspect["seed"]), str(suspect["cluster_id"]), distance, suspect["training_key"])
    table.caption = "distance: over the median of the cluster's held-out images"
    return table


def knowledge_table(found: dict[str, Any]) -> Table:
    """Accuracy of the ensemble and of every expert on the images of every cluster."""
    table = Table(title=f"Class by denoising: accuracy on {sum(found['images']):,} held-out images")
    table.add_column("")
    for cluster in range(len(found["images"])):
        table.add_column(f"cluster {cluster}", justify="right")
    table.add_column("all", justify="right")
    for voice, row, overall in zip(found["models"], found["accuracy"], found["overall"], strict=True):
        own = voice.removeprefix("expert_")
        cells = [f"[bold]{_percent(value)}[/]" if str(k) == own else _percent(value) for k, value in enumerate(row)]
        table.add_row(voice, *cells, _percent(overall))
    table.add_section()
    table.add_row("[dim]commonest class[/]", *map(_percent, found["floor"]), f"{_percent(found['chance'])} by chance")
    table.add_row("[dim]images[/]", *(f"{count:,}" for count in found["images"]), f"{sum(found['images']):,}")
    table.caption = (
        f"experts on their own cluster {_percent(found['own_cluster'])}, on others {_percent(found['other_clusters'])}"
    )
    return table


def _percent(value: float | None) -> str:
    return UNKNOWN if value is None else f"{100 * value:.1f} %"
