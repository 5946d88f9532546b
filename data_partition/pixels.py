"""Features that are principal components of the pixels."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8

from data_partition.pca import PCA, fit_pca
from data_partition.shards import read_batches
from data_partition.unit_rows import unit_rows

FILE = "pca.safetensors"
FIT_BATCH = 512


@dataclass(frozen=True, slots=True)
class PixelFeatures:
    """Principal components of flattened pixels in [0, 1]."""

    pca: PCA

    @classmethod
    def fit(cls, shards: Path, components: int, seed: int) -> "PixelFeatures":
        """Fit on every image in `shards`; there is nothing random in it."""
        return cls(fit_pca((flat(batch.images) for batch in read_batches(shards, FIT_BATCH)), components))

    @property
    def dimension(self) -> int:
        """Components kept."""
        return len(self.pca.components)

    @property
    def flops_per_image(self) -> float:
        """Two for each entry of the basis."""
        return 2.0 * self.pca.components.size

    @property
    def fit_flops_per_image(self) -> float:
        """Two for each entry of the covariance."""
        return 2.0 * len(self.pca.mean) ** 2

    def __call__(self, images: UInt8[np.ndarray, "batch height width channel"]) -> Float32[np.ndarray, "batch feature"]:
        """Coordinates in the basis, of length one."""
        return unit_rows(self.pca.encode(flat(images)))

    def save(self, folder: Path) -> None:
        """Write the basis."""
        self.pca.save(folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> "PixelFeatures":
        """Read the basis."""
        return cls(PCA.load(folder / FILE))


def flat(images: UInt8[np.ndarray, "batch height width channel"]) -> Float32[np.ndarray, "batch feature"]:
    """Pixels as rows in [0, 1]."""
    return images.reshape(len(images), -1).astype(np.float32) / np.float32(255)
