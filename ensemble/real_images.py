"""Random real images, read once, seen through several feature extractors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from data_partition.features import FeatureExtractor
from data_partition.shards import read_batches, read_index
from ensemble.spaces import scaled

BATCH_IMAGES = 256
"""Images that are read at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RealImages:
    """Features of randomly chosen images, in the order in which they were drawn."""

    features: dict[str, Float[np.ndarray, "image feature"]]
    """By the extractor's name; a shorter one holds the first rows of a longer one."""
    labels: Int[np.ndarray, " image"]
    """Classes of the longest, -1 without."""
    flops: float


def read_real_images(
    folder: Path,
    extractors: Mapping[str, FeatureExtractor],
    counts: Mapping[str, int],
    seed: int,
    on_progress: Callable[[int], None],
) -> RealImages:
    """Draw images from a folder of shards without replacement; extract `counts[name]` features of each kind.

    Every count is cut to the number of images there are.
    """
    total = read_index(folder).count
    rank = np.empty(total, np.int64)
    rank[np.random.default_rng(seed).permutation(total)] = np.arange(total)
    features = {
        name: np.empty((min(counts[name], total), extractor.dimension), np.float32)
        for name, extractor in extractors.items()
    }
    labels = np.empty(total, np.int64)
    start = 0
    for batch in read_batches(folder, BATCH_IMAGES):
        ranks = rank[start : start + len(batch.images)]
        labels[ranks] = batch.labels
        for name, extractor in extractors.items():
            chosen = ranks < len(features[name])
            if chosen.any():
                features[name][ranks[chosen]] = scaled(extractor(batch.images[chosen]))
        start += len(batch.images)
        on_progress(start)
    flops = sum(extractor.flops_per_image * len(features[name]) for name, extractor in extractors.items())
    return RealImages(features=features, labels=labels[: max(map(len, features.values()))], flops=float(flops))
