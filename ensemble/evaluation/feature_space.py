"""Held-out images in one feature space, precomputed for comparisons with any number of other sets."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from safetensors.numpy import load_file

from ddm_core.artifacts import save_arrays
from ensemble.evaluation.metrics import (
    frechet_distance,
    kernel_between,
    kernel_distance_error,
    kernel_within,
    neighbor_radii,
    share_covered,
)
from ensemble.evaluation.scores import Distances

Features = Float[np.ndarray, "sample feature"]


def scale_features(features: Features) -> Features:
    """Scale features of unit length to entries of about one.

    The kernel (x.y / d + 1)^3 then depends on the cosine of two images, not on the number of features.
    """
    return features * np.float32(np.sqrt(features.shape[1]))


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutSpace:
    """Held-out features and the statistics that the metrics need, computed once."""

    features: Float[np.ndarray, "held_out feature"]
    radii: Float[np.ndarray, " held_out"]
    """Squared distance of every row to its k-th nearest other row."""
    axes: Float[np.ndarray, "component feature"]
    """The first principal axes of the rows; the Fréchet distance is taken in these."""
    kernel: float
    """Mean of the cubic kernel over all pairs of rows."""

    @classmethod
    def fit(cls, features: Float[np.ndarray, "held_out feature"], components: int, neighbours: int) -> "HeldOutSpace":
        """Precompute the statistics; raise `ValueError` if there are too few rows."""
        return cls(
            features=features,
            radii=neighbor_radii(features, neighbours),
            axes=principal_axes(features, components),
            kernel=kernel_within(features),
        )

    def compare(self, features: Features, neighbours: int) -> Distances:
        """Return the distances of other features from the held-out ones; raise `ValueError` if they are too few."""
        self._check_count(len(features))
        blocks = min(10, len(features) // 4, len(self.features) // 4)
        kid = kernel_within(features) + self.kernel - 2 * kernel_between(features, self.features)
        return Distances(
            fd=frechet_distance(features @ self.axes.T, self.features @ self.axes.T),
            kid=kid,
            kid_std=kernel_distance_error(features, self.features, blocks),
            precision=share_covered(features, self.features, self.radii),
            recall=share_covered(self.features, features, neighbor_radii(features, neighbours)),
        )

    def save(self, file: Path) -> None:
        """Write the space as safetensors."""
        kernel = np.array([self.kernel])
        save_arrays(file, {"features": self.features, "radii": self.radii, "axes": self.axes, "kernel": kernel})

    @classmethod
    def load(cls, file: Path) -> "HeldOutSpace":
        """Read what `save` wrote."""
        arrays = load_file(file)
        return cls(
            features=arrays["features"], radii=arrays["radii"], axes=arrays["axes"], kernel=float(arrays["kernel"][0])
        )

    def _check_count(self, count: int) -> None:
        components = len(self.axes)
        if count <= components:
            raise ValueError(
                f"the Fréchet distance in {components} components needs more than {components} samples, "
                f"not {count}; raise `num_samples` or lower `components`"
            )


def principal_axes(features: Features, components: int) -> Float[np.ndarray, "component feature"]:
    """Return the first principal axes of the rows, at most as many as there are features."""
    components = min(components, features.shape[1])
    if len(features) <= components:
        raise ValueError(
            f"the Fréchet distance in {components} components needs more than {components} held-out images, "
            f"not {len(features)}; raise `data.holdout` or lower `components`"
        )
    axes = np.linalg.eigh(np.cov(features, rowvar=False, dtype=np.float64))[1]
    return np.ascontiguousarray(axes[:, ::-1][:, :components].T.astype(np.float32))
