"""The tiles at the top of the report: how many samples, how good, at what cost, in what time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.reporting.costs import CostRow
from orchestrator.reporting.tables.ranking import ScoreRow, rank_rows
from orchestrator.run.attempts import Attempt

BASELINES = ("monolith", "cluster_conditioned", "distilled_monolith")
"""Rows of the table of scores that are not ensembles."""

SMALLEST_FD = 1e-12
"""Smaller Fréchet distances count as this one, because nothing is divided by zero."""

UNITS = ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "min"), (60, "min", 1, "s"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One number of the summary."""

    label: str
    value: str
    note: str
    anchor: str
    """The section of the page with the details."""


def summary_tiles(rows: Sequence[ScoreRow], costs: CostRow, attempts: Sequence[Attempt]) -> list[Tile]:
    """Return a tile for samples, best score, cost and time each, as far as the run has them."""
    tiles = _score_tiles(rows) if rows else []
    return tiles + _cost_tiles(costs, attempts) if costs.attempts else tiles


def fd_ratio(row: ScoreRow, other: ScoreRow) -> float:
    """Return a row's Fréchet distance over that of another row, in the first feature space."""
    ours, theirs = (next(iter(scores["spaces"].values()))["fd"] for scores in (row.scores, other.scores))
    return float(ours / max(theirs, SMALLEST_FD))


def busy_seconds(attempts: Sequence[Attempt]) -> float:
    """Return the seconds in which at least one attempt ran."""
    busy, busy_until = 0.0, -math.inf
    for attempt in sorted(attempts, key=lambda attempt: attempt.start):
        busy += max(0.0, attempt.end - max(attempt.start, busy_until))
        busy_until = max(busy_until, attempt.end)
    return busy


def format_duration(seconds: float) -> str:
    """Return seconds in their two largest units: 4.2 s, 1 min 15 s, 2 h 5 min, 3 d 4 h."""
    for large, large_name, small, small_name in UNITS:
        if round(seconds / small) * small >= large:
            count, rest = divmod(round(seconds / small), large // small)
            return f"{count} {large_name} {rest} {small_name}"
    return f"{seconds:.1f} s"


def _score_tiles(rows: Sequence[ScoreRow]) -> list[Tile]:
    ensembles = [row for row in rows if row.name not in BASELINES]
    samples = Tile(
        label="Samples",
        value=f"{rows[0].scores['num_samples']:,}",
        note=f"for each of {len(rows)} scored models" if len(rows) > 1 else "of one scored model",
        anchor="scores",
    )
    if not ensembles:
        return [samples]
    ranking, monolith = rank_rows(rows), next((row for row in rows if row.name == "monolith"), None)
    shown = next((row for row in ensembles if row.is_default), ensembles[0])
    best = min(ensembles, key=lambda row: (ranking.ranks.get(row.name, 1), not row.is_default))
    if monolith is None:
        return [samples, _absolute_tile(best if ranking.ranks else shown, is_best=bool(ranking.ranks))]
    if not ranking.ranks or ranking.ranks[best.name] == ranking.ranks[monolith.name]:
        reason = ranking.reason if not ranking.ranks else "No difference seen to the monolith; see the ranks."
        return [samples, Tile(label="Against the monolith", value="not ranked", note=reason, anchor="scores")]
    return [
        samples,
        Tile(
            label="Best score against the monolith",
            value=f"{fd_ratio(best, monolith):.2f} ×",
            note=f"the monolith's Fréchet distance in {_first_space(best)}, with {best.label}; above 1 is worse",
            anchor="scores",
        ),
    ]


def _absolute_tile(row: ScoreRow, *, is_best: bool) -> Tile:
    """Return the row's Fréchet distance beside those of the codec and of real images."""
    space = _first_space(row)
    score = row.scores["spaces"][space]
    return Tile(
        label="Best score" if is_best else "Score",
        value=f"{score['fd']:.3g}",
        note=f"Fréchet distance in {space}, with {row.label}; lower is better, "
        f"the codec alone has {score['codec']['fd']:.3g}, real images have {score['floor']['fd']:.3g}",
        anchor="scores",
    )


def _first_space(row: ScoreRow) -> str:
    return str(next(iter(row.scores["spaces"])))


def _cost_tiles(costs: CostRow, attempts: Sequence[Attempt]) -> list[Tile]:
    reserved = f"{format_duration(costs.cpu_seconds)} of reserved CPU time"
    if costs.gpu_seconds:
        reserved = f"{format_duration(costs.gpu_seconds)} of reserved GPU time, {reserved}"
    lost = f"{format_duration(costs.lost_s)} lost" if costs.lost_s else "no work done twice"
    if costs.price:
        value, note = f"{costs.price:.4g}", f"in the currency of the prices; {reserved}; {lost}"
    else:
        held, name = (costs.gpu_seconds, "GPU") if costs.gpu_seconds else (costs.cpu_seconds, "CPU")
        value, note = format_duration(held), f"of reserved {name} time; {lost}, no machine had a price"
    return [
        Tile(label="Cost", value=value, note=note, anchor="costs"),
        Tile(
            label="Time",
            value=format_duration(busy_seconds(attempts)),
            note=f"with a worker running; {format_duration(costs.seconds)} of worker time in {costs.attempts} attempts",
            anchor="timeline",
        ),
    ]
