"""Whether a training diverges: a loss that is not finite, or far above those before it."""

import math
from collections.abc import Sequence
from statistics import median

WINDOW, LEAST = 20, 5
"""Losses that a new one is compared with: the last 20, and none before there are five."""


def find_divergence(loss: float, before: Sequence[float], factor: float | None) -> str:
    """Return what is wrong with a loss, as the rest of a sentence; empty for a good one.

    `factor` is the largest ratio to the running median of the losses `before` it; None: any.
    """
    if not math.isfinite(loss):
        return f"{loss}"
    if factor is None or len(before) < LEAST:
        return ""
    usual = median(before[-WINDOW:])
    return f"{loss:.4g}, over {factor:g} times the {usual:.4g} of before," if loss > factor * usual > 0 else ""
