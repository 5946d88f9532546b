"""Rank the rows of the table of scores, as far as their differences exceed their errors."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ensemble.evaluation.spaces import CLEAR_ERRORS, MIN_RANKED_HELD_OUT, RANKED_SPACE, is_clear
from router.config import AUTO


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRow:
    """One row of the table of scores."""

    name: str
    """The selection, or `monolith`."""
    scores: dict[str, Any]
    """`scores.json` of the stage."""
    is_default: bool
    """Whether `ddm sample` generates with it."""

    @property
    def label(self) -> str:
        """Return the name, and for `auto` also the selection that it resolves to."""
        return f"{self.name}: {self.scores['selection']}" if self.name == AUTO else self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Ranks of rows, and how to read them."""

    reason: str
    """A sentence: why nothing is ranked, or what equal ranks mean; empty for fewer than two rows."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """By the row's name: 1 + the number of rows that are clearly better; empty if nothing is ranked."""


def rank_rows(rows: Sequence[ScoreRow]) -> Ranking:
    """Rank the rows by Fréchet distance and KID in the space that ranks."""
    if len(rows) < 2:
        return Ranking(reason="")
    if any(RANKED_SPACE not in row.scores["spaces"] for row in rows):
        return Ranking(
            reason=f"Nothing is ranked: only {RANKED_SPACE} features rank, and these scores lack them; "
            f"set scores.spaces=[{RANKED_SPACE},pixels]."
        )
    held_out, samples = (min(row.scores[key] for row in rows) for key in ("held_out", "num_samples"))
    if held_out < MIN_RANKED_HELD_OUT:
        return Ranking(
            reason=f"Nothing is ranked: there are {held_out} held-out images, and a ranking needs "
            f"{MIN_RANKED_HELD_OUT}; raise data.holdout or add images."
        )
    ranks = {row.name: 1 + sum(is_better(other, row) for other in rows) for row in rows}
    if max(ranks.values()) == 1:
        return Ranking(reason=f"No difference seen at {samples:,} samples; more with scores.num_samples=.")
    return Ranking(
        ranks=ranks,
        reason=f"A row is ranked below another if its Fréchet distance and its KID in {RANKED_SPACE} are both worse by "
        f"more than {CLEAR_ERRORS:g} standard errors; between equal ranks no difference was seen at {samples:,} "
        "samples. The errors do not include another training.",
    )


def is_better(row: ScoreRow, other: ScoreRow) -> bool:
    """Return whether a row is clearly better than another in Fréchet distance and in KID."""
    ours, theirs = (scores["spaces"][RANKED_SPACE] for scores in (row.scores, other.scores))
    return all(
        ours[key] < theirs[key]
        and is_clear(float(ours[key] - theirs[key]), float(ours[f"{key}_std"]), float(theirs[f"{key}_std"]))
        for key in ("fd", "kid")
    )


def is_blurred(score: Mapping[str, Any], num_samples: int) -> bool:
    """Return whether a space's precision is clearly above that of real images."""
    precision, floor = score["precision"], score["floor"]["precision"]
    return bool(is_clear(max(0.0, precision - floor), math.sqrt(2 * floor * (1 - floor) / num_samples)))
