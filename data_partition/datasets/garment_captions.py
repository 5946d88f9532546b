"""Captions of the packaged garments, composed of what is measured in each picture: tone, shape and kind.

"a dark wide ankle boot", "a light t-shirt", "a coat". A picture between two words of an attribute gets neither, so that
every word that stands in a caption is plain to see. The thresholds of the shape are quantiles .3 and .7 of its kind.
"""

import numpy as np
from jaxtyping import Bool, UInt8

KINDS = (
    "t-shirt",
    "pair of trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
"""The noun of every class, in the order of the data set's labels."""

BACKGROUND = 20
"""Pixels up to this value are not part of the garment."""

DARK, LIGHT = 0.5, 0.66
"""A garment whose mean value is below the first is dark, above the second light."""

ASPECTS = (
    (0.75, 0.82),
    (0.39, 0.43),
    (0.73, 0.79),
    (0.45, 0.57),
    (0.68, 0.75),
    (1.42, 2.36),
    (0.75, 0.79),
    (2.0, 2.36),
    (0.9, 1.38),
    (1.22, 1.47),
)
"""Width by height of the garment of every kind, below which it is tall and above which it is wide."""


def compose_caption(image: UInt8[np.ndarray, "height width 1"], label: int) -> str:
    """Return the caption of a garment of this class; light pixels on black ground."""
    is_garment = image[:, :, 0] > BACKGROUND
    if not is_garment.any():
        return _with_article([KINDS[label]])
    words = [*_tone(float(image[:, :, 0][is_garment].mean()) / 255), *_shape(is_garment, label), KINDS[label]]
    return _with_article(words)


def _with_article(words: list[str]) -> str:
    return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


def _tone(mean: float) -> list[str]:
    if DARK <= mean <= LIGHT:
        return []
    return ["dark" if mean < DARK else "light"]


def _shape(is_garment: Bool[np.ndarray, "height width"], label: int) -> list[str]:
    rows, columns = is_garment.any(1).nonzero()[0], is_garment.any(0).nonzero()[0]
    aspect = (columns[-1] - columns[0] + 1) / (rows[-1] - rows[0] + 1)
    tall, wide = ASPECTS[label]
    if tall <= aspect <= wide:
        return []
    return ["tall" if aspect < tall else "wide"]
