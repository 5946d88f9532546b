"""The table of scores for a terminal; the report has more columns."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from orchestrator.reporting.tables.analysis_tables import SURPRISING, UNKNOWN
from orchestrator.reporting.tables.ranking import ScoreRow, rank_rows

HEADINGS = {"efficientnet_lite0": "Efficient\nNet"}
"""Short names of feature spaces: the table fits into 80 columns."""
UNITS = {"fd": " FD", "kid": " KID\nx1000"}
TEXT_SCORES = (("prompt\nrecall", "recall"), ("class\nright", "class_accuracy"))
"""Scores of runs with text."""
SCALES = {"fd": 1, "kid": 1000}
"""Shown distances, and by what they are multiplied."""


def score_table(rows: Sequence[ScoreRow]) -> Table:
    """Return the scores as a table; beside each distance stands its excess over the codec's own."""
    table = Table(title="Scores against held-out images", padding=0, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    if not rows:
        return table
    first, ranking = rows[0].scores, rank_rows(rows)
    columns = [(space, key) for space, score in first["spaces"].items() for key in SCALES if score[key] is not None]
    distances = [f"{HEADINGS.get(space, space)}{UNITS[key]}" for space, key in columns]
    texts = [(heading, key) for heading, key in TEXT_SCORES if (first.get("text") or {}).get(key) is not None]
    text_headings = [heading for heading, _ in texts]
    for heading in ("rank", *distances, *text_headings, "cluster\nTV", "near\ncopies", "calls\na step"):
        table.add_column(Text(heading), justify="right", overflow="fold")
    for row in rows:
        cells = [_distance(row.scores["spaces"][space], key) for space, key in columns]
        cells += [Text(_share(row.scores, key)) for _, key in texts]
        rest = (f"{row.scores['cluster_share_tv']:.3f}", _copies(row.scores["copies"]))
        label = Text(f"{row.label} *", style="bold") if row.is_default else Text(row.label)
        rank = str(ranking.ranks.get(row.name, UNKNOWN))
        table.add_row(label, rank, *cells, *rest, f"{row.scores['calls_per_step']:.2f}")
    table.add_section()
    for name, role in (("codec alone", "codec"), ("real images", "floor")):
        values = [f"{SCALES[key] * first['spaces'][space][role][key]:.4g}" for space, key in columns]
        is_floor = role == "floor"
        values += [_share(first, f"{key}_real") if is_floor else UNKNOWN for _, key in texts]
        tv = f"{first['cluster_share_tv_floor']:.3f}" if is_floor else UNKNOWN
        copies = f"{100 * first['copies']['expected']:.1f} %" if is_floor else UNKNOWN
        table.add_row(Text(name, style="dim"), UNKNOWN, *values, tv, copies, UNKNOWN)
    table.caption = (
        f"{ranking.reason}\n* the default selection   + excess over the codec alone   TV: total variation of shares\n"
        "near copies: samples nearer to a training image than the closest 1 % of held-out images; red is memorization"
    ).strip()
    return table


def _distance(score: dict[str, Any], key: str) -> Text:
    value, scale = score[key], SCALES[key]
    excess = f"{scale * (value - score['codec'][key]):+.4g}"
    return Text.assemble(f"{scale * value:.4g}\n", (excess, "dim"))


def _share(scores: dict[str, Any], key: str) -> str:
    text = scores.get("text") or {}
    return f"{text[key]:.2f}" if text.get(key) is not None else UNKNOWN


def _copies(copies: dict[str, float]) -> Text:
    text = f"{100 * copies['share']:.1f} %"
    return Text(text, style="red" if copies["p_value"] < SURPRISING else "")
