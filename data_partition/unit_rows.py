"""Rows of length one."""

import numpy as np
from jaxtyping import Float, Float32


def unit_rows(values: Float[np.ndarray, "batch feature"]) -> Float32[np.ndarray, "batch feature"]:
    """Each row divided by its Euclidean length; a row of zeros becomes the first unit vector."""
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    rows: Float32[np.ndarray, "batch feature"] = (values / np.maximum(lengths, 1e-30)).astype(np.float32)
    rows[lengths[:, 0] == 0, 0] = 1.0
    return rows
