"""The feature spaces of the scores, and what each is trusted to measure.

A score ranks only where damage to real images makes it worse in order: more speckle, blur or posterization, fewer
components of a codec, fewer classes (`tests/laws/test_score_laws.py`, `benchmarks/score_laws.py`). Of all scores in
three spaces only the Fréchet distance and KID in EfficientNet features pass. In pixels blur lowers the Fréchet
distance, in random_conv mild speckle does. In both precision rises with blur, and recall with speckle. So KID,
precision and recall are computed in EfficientNet features alone, where precision is a sign of blur, not of quality.
"""

import math

RANKED_SPACE = "efficientnet_lite0"
"""The space by whose Fréchet distance and KID a table ranks."""
PIXELS = "pixels"
"""All pixels; images above 32 pixels are scaled down."""

MIN_RANKED_HELD_OUT = 500
"""Fewer held-out images rank nothing."""
CLEAR_ERRORS = 2.0
"""Standard errors that a difference must exceed."""


def is_clear(difference: float, *errors: float) -> bool:
    """Return whether a difference of two scores exceeds their errors."""
    return abs(difference) > CLEAR_ERRORS * math.hypot(*errors)
