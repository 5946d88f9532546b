"""Principal components of a stream of batches: sums in float64, so that no batch is kept in memory."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32
from safetensors.numpy import load_file

from data_partition.config import MAX_FEATURES
from data_partition.errors import NoSamples, TooManyFeatures
from ddm_core.artifacts import save_arrays


@dataclass(frozen=True, slots=True, kw_only=True)
class PCA:
    """An orthonormal basis of the directions of largest variance, in descending order of variance."""

    mean: Float[np.ndarray, " feature"]
    components: Float[np.ndarray, "component feature"]
    variances: Float[np.ndarray, " component"]

    def encode(self, values: Float[np.ndarray, "batch feature"]) -> Float[np.ndarray, "batch component"]:
        """Return coordinates in the basis."""
        codes: Float[np.ndarray, "batch component"] = (values - self.mean) @ self.components.T
        return codes

    def decode(self, codes: Float[np.ndarray, "batch component"]) -> Float[np.ndarray, "batch feature"]:
        """Return the values with these coordinates: the closest approximation of the encoded values."""
        values: Float[np.ndarray, "batch feature"] = codes @ self.components + self.mean
        return values

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        save_arrays(path, {"mean": self.mean, "components": self.components, "variances": self.variances})

    @classmethod
    def load(cls, path: Path) -> "PCA":
        """Read what `save` wrote."""
        arrays = load_file(path)
        return cls(mean=arrays["mean"], components=arrays["components"], variances=arrays["variances"])


def fit_pca(batches: Iterable[Float[np.ndarray, "batch feature"]], k: int) -> PCA:
    """Fit at most `k` components, never more than the number of features; memory does not grow with the data.

    Components are float32, each with its largest entry positive, so that equal data give equal bytes.
    Raises `NoSamples` or `TooManyFeatures`.
    """
    count, total, squares = 0, np.zeros(0), np.zeros((0, 0))
    for batch in batches:
        values = np.asarray(batch, dtype=np.float64)
        if count == 0:
            total, squares = _new_accumulators(values.shape[1])
        count += len(values)
        total += values.sum(axis=0)
        squares += values.T @ values
    if count == 0:
        raise NoSamples("principal components need at least one sample; check the data set")
    mean = total / count
    return _leading_components(mean, squares / count - np.outer(mean, mean), k)


def _new_accumulators(features: int) -> tuple[Float[np.ndarray, " feature"], Float[np.ndarray, "feature feature"]]:
    if features > MAX_FEATURES:
        raise TooManyFeatures(
            f"principal components of {features} values an image need more than the {MAX_FEATURES} that fit; "
            "set a smaller data.image_size, or codec=pixels with expert=unet"
        )
    return np.zeros(features), np.zeros((features, features))


def _leading_components(
    mean: Float[np.ndarray, " feature"], covariance: Float[np.ndarray, "feature feature"], k: int
) -> PCA:
    import scipy.linalg  # half a second to import, and a fitted basis needs none of it

    features = len(mean)
    first = max(features - k, 0)
    variances, vectors = scipy.linalg.eigh(covariance, subset_by_index=(first, features - 1))
    components = vectors.T[::-1]
    largest = np.abs(components).argmax(axis=1)
    signs = np.where(components[np.arange(len(components)), largest] < 0, -1.0, 1.0)
    return PCA(
        mean=mean.astype(np.float32),
        components=np.ascontiguousarray(components * signs[:, None], dtype=np.float32),
        variances=np.maximum(variances[::-1], 0.0).astype(np.float32),
    )


def l2_normalize(values: Float[np.ndarray, "batch feature"]) -> Float32[np.ndarray, "batch feature"]:
    """Divide each row by its Euclidean length; a row of zeros becomes the first unit vector."""
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    rows: Float32[np.ndarray, "batch feature"] = (values / np.maximum(lengths, 1e-30)).astype(np.float32)
    rows[lengths[:, 0] == 0, 0] = 1.0
    return rows
