"""Held-out images in one feature space, precomputed for comparisons with any number of other sets."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float
from safetensors.numpy import load_file

from ddm_core.artifacts import save_arrays
from ensemble.evaluation.metrics import (
    frechet_distance,
    frechet_distance_error,
    kernel_distance,
    neighbor_radii,
    share_covered,
)
from ensemble.evaluation.scores import Distances
from ensemble.evaluation.spaces import PIXELS, RANKED_SPACE

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
    axes: Float[np.ndarray, "component feature"] | None = None
    """The first principal axes of the rows, in which the Fréchet distance is taken; None takes it in all features."""
    radii: Float[np.ndarray, " held_out"] | None = None
    """Squared distance of every row to its k-th nearest other row; None without KID, precision and recall."""

    @classmethod
    def fit(cls, name: str, features: Features, components: int, neighbours: int) -> "HeldOutSpace":
        """Precompute the statistics of the space `name`; raise `ValueError` if there are too few rows."""
        return cls(
            features=features,
            axes=None if name == PIXELS else principal_axes(features, components),
            radii=neighbor_radii(features, neighbours) if name == RANKED_SPACE else None,
        )

    def with_features(self, features: Features, neighbours: int) -> "HeldOutSpace":
        """Return other features in the place of the held-out ones, with the same axes."""
        return replace(
            self, features=features, radii=None if self.radii is None else neighbor_radii(features, neighbours)
        )

    def compare(self, features: Features, neighbours: int) -> Distances:
        """Return the distances of other features from the held-out ones; raise `ValueError` if they are too few."""
        first, second = features, self.features
        if self.axes is not None:
            self._check_count(len(features), len(self.axes))
            first, second = features @ self.axes.T, self.features @ self.axes.T
        fd = frechet_distance(first, second)
        if self.radii is None:
            return Distances(fd=fd)
        kid, kid_std = kernel_distance(features, self.features)
        return Distances(
            fd=fd,
            fd_std=frechet_distance_error(first, second),
            kid=kid,
            kid_std=kid_std,
            precision=share_covered(features, self.features, self.radii),
            recall=share_covered(self.features, features, neighbor_radii(features, neighbours)),
        )

    def save(self, file: Path) -> None:
        """Write the space as safetensors."""
        arrays = {"features": self.features, "axes": self.axes, "radii": self.radii}
        save_arrays(file, {name: array for name, array in arrays.items() if array is not None})

    @classmethod
    def load(cls, file: Path) -> "HeldOutSpace":
        """Read what `save` wrote."""
        return cls(**load_file(file))

    def _check_count(self, count: int, components: int) -> None:
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
