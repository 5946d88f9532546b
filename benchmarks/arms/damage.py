"""Real images, and ladders of damage to them: what a score must call worse, and worse in order."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8
from scipy.ndimage import gaussian_filter
from torch.nn import functional

from data_partition.config import DataConfig
from data_partition.datasets.sources import fashion
from data_partition.features.pca import PCA, fit_pca
from data_partition.features.pixels import flatten_pixels
from data_partition.shards.shards import Sample

Images = UInt8[np.ndarray, "image height width channel"]
Labels = Int[np.ndarray, " image"]

SIDE = 32
SPECKLE, BLUR, LEVELS, COMPONENTS, DROPPED = (0.05, 0.1, 0.2), (0.5, 1, 2), (8, 4, 2), (96, 32, 8), (0.2, 0.5, 0.8)
"""Steps of each ladder, the least damage first: standard deviation over the range, pixels, grey levels per channel,
principal components of a codec, share of the classes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RealSet:
    """Images with classes, in random order."""

    images: Images
    labels: Labels

    @classmethod
    def shuffled(cls, images: Images, labels: Labels) -> "RealSet":
        """Shuffle images and labels."""
        order = np.random.default_rng(0).permutation(len(images))
        return cls(images=images[order], labels=labels[order])


def load_garments(limit: int | None = None) -> RealSet:
    """Read the garments of the package, 28 x 28 and grey."""
    samples = [sample for sample in islice(fashion(DataConfig()).train(), limit) if isinstance(sample, Sample)]
    images = np.stack([sample.image for sample in samples])
    return RealSet.shuffled(images, np.array([sample.label for sample in samples], np.int64))


def load_photo_patches(count: int = 2000) -> RealSet:
    """Cut random squares of 32 to 128 pixels out of scikit-learn's two photographs, which are the classes."""
    from sklearn.datasets import load_sample_images

    rng, patches = np.random.default_rng(0), []
    photographs = load_sample_images().images
    for photograph in photographs:
        for _ in range(count):
            side = int(rng.integers(SIDE, 4 * SIDE + 1))
            top, left = (int(rng.integers(0, size - side + 1)) for size in photograph.shape[:2])
            patches.append(scale_down(photograph[None, top : top + side, left : left + side]))
    return RealSet.shuffled(np.concatenate(patches), np.repeat(np.arange(len(photographs)), count))


def load_emoji(files: Sequence[Path]) -> RealSet:
    """Read archives with the arrays `image` (64 x 64 RGB) and `category`, scaled to 32."""
    archives = [np.load(file, allow_pickle=False) for file in files]
    categories = np.concatenate([archive["category"] for archive in archives])
    images = np.concatenate([scale_down(archive["image"]) for archive in archives])
    return RealSet.shuffled(images, np.unique(categories, return_inverse=True)[1])


def scale_down(images: Images) -> Images:
    """Scale images to 32 x 32 pixels."""
    tensor = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    small = functional.interpolate(tensor, (SIDE, SIDE), mode="bilinear", antialias=True)
    return _to_bytes(small.permute(0, 2, 3, 1).numpy())


def damage_ladders(real: RealSet, count: int) -> Mapping[str, Sequence[Images]]:
    """Return, by the kind of damage, `count` images at each step, the least damage first."""
    images, rng = real.images[:count], np.random.default_rng(1)
    pca = fit_pca([flatten_pixels(real.images)], max(COMPONENTS))
    changes: dict[str, list[Callable[[], Images]]] = {
        "speckle": [lambda s=s: _to_bytes(images + rng.normal(0, 255 * s, images.shape)) for s in SPECKLE],
        "blur": [lambda s=s: _to_bytes(gaussian_filter(images.astype(np.float32), (0, s, s, 0))) for s in BLUR],
        "posterization": [lambda n=n: posterize(images, n) for n in LEVELS],
        "codec": [lambda k=k: through_components(pca, images, k) for k in COMPONENTS],
        "classes dropped": [lambda share=share: drop_classes(real, share)[:count] for share in DROPPED],
    }
    if len(np.unique(real.labels)) == 2:
        changes["classes dropped"] = changes["classes dropped"][1:2]
    return {kind: [change() for change in steps] for kind, steps in changes.items()}


def posterize(images: Images, levels: int) -> Images:
    """Round every channel to equally spaced levels."""
    return _to_bytes(np.rint(images / 255 * (levels - 1)) / (levels - 1) * 255)


def through_components(pca: PCA, images: Images, components: int) -> Images:
    """Keep the first principal components of the images."""
    codes = pca.encode(flatten_pixels(images))
    codes[:, components:] = 0
    return _to_bytes(255 * pca.decode(codes).reshape(images.shape))


def drop_classes(real: RealSet, share: float) -> Images:
    """Return the images of the remaining classes after the last ones are dropped."""
    classes = np.unique(real.labels)
    return real.images[np.isin(real.labels, classes[: max(1, round(len(classes) * (1 - share)))])]


def _to_bytes(values: np.ndarray) -> Images:
    images: Images = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return images
