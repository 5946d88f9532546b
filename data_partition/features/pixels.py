"""Pixel features: principal components of the pixels; large images are scaled down first."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch.nn import functional

from data_partition.features.fit_sample import read_fit_batches
from data_partition.features.pca import PCA, fit_pca, l2_normalize

FILE = "pca.safetensors"
FIT_BATCH = 512
LARGEST_SIDE = 32


@dataclass(frozen=True, slots=True)
class PixelFeatures:
    """Principal components of flattened pixels in [0, 1]; images above `LARGEST_SIDE` are scaled down to it."""

    pca: PCA

    @classmethod
    def fit(cls, shards: Path, components: int, seed: int) -> "PixelFeatures":
        """Fit on the images in `shards`, at most 2^18; deterministic, `seed` is unused."""
        batches = read_fit_batches(shards, FIT_BATCH)
        return cls(fit_pca((flatten_pixels(batch.images) for batch in batches), components))

    @property
    def dimension(self) -> int:
        """Return the number of components."""
        return len(self.pca.components)

    @property
    def flops_per_image(self) -> float:
        """Return two FLOPs for each entry of the basis."""
        return 2.0 * self.pca.components.size

    @property
    def fit_flops_per_image(self) -> float:
        """Return two FLOPs for each entry of the covariance."""
        return 2.0 * len(self.pca.mean) ** 2

    def __call__(self, images: UInt8[np.ndarray, "batch height width channel"]) -> Float32[np.ndarray, "batch feature"]:
        """Return coordinates in the basis, each row of Euclidean length one."""
        return l2_normalize(self.pca.encode(flatten_pixels(images)))

    def save(self, folder: Path) -> None:
        """Write the basis."""
        self.pca.save(folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> "PixelFeatures":
        """Read the basis."""
        return cls(PCA.load(folder / FILE))


def flatten_pixels(images: UInt8[np.ndarray, "batch height width channel"]) -> Float32[np.ndarray, "batch feature"]:
    """Flatten pixels to rows in [0, 1]; images above `LARGEST_SIDE` are scaled down to it."""
    values = images.astype(np.float32) / np.float32(255)
    if max(images.shape[1:3]) > LARGEST_SIDE:
        scaled = torch.from_numpy(values).permute(0, 3, 1, 2)
        small = functional.interpolate(scaled, (LARGEST_SIDE, LARGEST_SIDE), mode="bilinear", antialias=True)
        values = small.permute(0, 2, 3, 1).numpy()
    return values.reshape(len(images), -1)
