"""Feature extraction: images → feature vectors of length one, which are clustered.

    pixels              principal components of the pixels
    random_conv         a convolutional network with fixed random parameters
    efficientnet_lite0  a small network trained on ImageNet, from two PyPI packages
    transformers        DINOv2, DINOv3, SigLIP, CLIP …, from a folder or the Hub

To add an extractor, write a class with the members of `FeatureExtractor`, `fit` and `load`, and
add it to `EXTRACTORS`.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, UInt8

from data_partition.config import PartitionConfig
from data_partition.errors import UnknownExtractor
from data_partition.features.efficientnet import EfficientNetFeatures
from data_partition.features.fit_sample import count_fit_images
from data_partition.features.pixels import PixelFeatures
from data_partition.features.random_conv import RandomConvFeatures
from data_partition.features.store import FeatureFile
from data_partition.features.vision_model import VisionFeatures
from data_partition.shards.shards import ImageBatch, read_batches, read_index
from ddm_core.artifacts import (
    Preempted,
    Workspace,
    atomic_folder,
    fingerprint,
    list_files,
    read_json,
    write_json,
)
from ddm_core.engine import row_ranges
from ddm_core.files.checksums import checksum

EXTRACTOR = "extractor.json"
PIECE_ROWS = 2048
"""Images that are read in one go, as many as a shard has by default."""


@runtime_checkable
class FeatureExtractor(Protocol):
    """Map from images of one shape to vectors of length one."""

    @property
    def dimension(self) -> int:
        """Return the length of a feature vector."""

    @property
    def flops_per_image(self) -> float:
        """Return the floating point operations per image."""

    @property
    def fit_flops_per_image(self) -> float:
        """Return the floating point operations per image while fitting."""

    def __call__(self, images: UInt8[np.ndarray, "batch height width channel"]) -> Float32[np.ndarray, "batch feature"]:
        """Return the features of a batch, each row of Euclidean length one."""

    def save(self, folder: Path) -> None:
        """Write the files that `load` of the same class reads."""


@dataclass(frozen=True, slots=True)
class ExtractorKind:
    """Constructors of one kind of extractor."""

    fit: Callable[[Path, int, int], FeatureExtractor]
    """(shards, or the network for `transformers`; number of components; seed) -> extractor; an extractor ignores the
    arguments it does not need."""
    load: Callable[[Path], FeatureExtractor]


EXTRACTORS: dict[str, ExtractorKind] = {
    "pixels": ExtractorKind(PixelFeatures.fit, PixelFeatures.load),
    "random_conv": ExtractorKind(RandomConvFeatures.fit, RandomConvFeatures.load),
    "efficientnet_lite0": ExtractorKind(EfficientNetFeatures.fit, EfficientNetFeatures.load),
    "transformers": ExtractorKind(VisionFeatures.fit, VisionFeatures.load),
}


def fit_extractor(name: str, shards: Path, components: int, seed: int) -> FeatureExtractor:
    """Fit an extractor on the images in `shards`; the same images and seed give the same extractor."""
    return EXTRACTORS[name].fit(shards, components, seed)


def save_extractor(name: str, extractor: FeatureExtractor, folder: Path) -> None:
    """Write an extractor into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    extractor.save(folder)
    write_json(folder / EXTRACTOR, {"name": name, "dimension": extractor.dimension})


def load_extractor(folder: Path) -> FeatureExtractor:
    """Read what `save_extractor` wrote; raises `UnknownExtractor` for a name that is not in `EXTRACTORS`."""
    name = read_json(folder / EXTRACTOR)["name"]
    if name not in EXTRACTORS:
        raise UnknownExtractor(
            f"{folder} has features named {name!r}, known are {', '.join(EXTRACTORS)}; extract again"
        )
    return EXTRACTORS[name].load(folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureSummary:
    """Number, dimension and FLOPs of the features."""

    count: int
    dimension: int
    flops: float


def extract_features(config: PartitionConfig, dataset: Path, out: Path, workspace: Workspace) -> FeatureSummary:
    """Write `out/features.npy` (float32), `out/keys.txt` and `out/extractor` for the images in `dataset/train`.

    Every finished batch stays in the scratch folder, so that a later attempt continues with the next one.
    Raises `Preempted` on a stop request.
    """
    shards = dataset / "train"
    count = read_index(shards).count
    cache = workspace.scratch / f"features-{_cache_key(config, shards)}"
    extractor = _load_or_fit_extractor(config, shards, cache / "extractor")
    with FeatureFile(cache, count, extractor.dimension) as file:
        start = partial(_start_extraction, cache / "extractor", shards, config.batch_size)
        pieces = row_ranges(file.rows, count, config.batch_size * max(1, PIECE_ROWS // config.batch_size))
        for keys, features in workspace.engine.map(start, pieces):
            file.append(keys, features)
            workspace.report_progress(file.rows, count, unit="images")
            if file.rows < count and workspace.stop_requested():
                raise Preempted(f"stopped after the features of {file.rows} of {count} images, which are kept")
        file.copy_to(out)
    save_extractor(config.features, extractor, out / "extractor")
    flops = count * extractor.flops_per_image + count_fit_images(count) * extractor.fit_flops_per_image
    return FeatureSummary(count=count, dimension=extractor.dimension, flops=flops)


def _start_extraction(
    folder: Path, shards: Path, batch_size: int
) -> Callable[[tuple[int, int]], Iterator[tuple[list[str], Float32[np.ndarray, "batch feature"]]]]:
    """Return the function that yields keys and features of the rows of a range, in batches."""
    extractor = load_extractor(folder)

    def extract(rows: tuple[int, int]) -> Iterator[tuple[list[str], Float32[np.ndarray, "batch feature"]]]:
        for batch in iter_batches(shards, batch_size, *rows):
            yield batch.keys, extractor(batch.images)

    return extract


def iter_batches(shards: Path, batch_size: int, start: int, stop: int) -> Iterator[ImageBatch]:
    """Yield the images of the rows from `start` to `stop`, in batches; `stop` ends a batch, or is that of all."""
    return itertools.islice(read_batches(shards, batch_size, start), -(-(stop - start) // batch_size))


def _cache_key(config: PartitionConfig, shards: Path) -> str:
    """Return a hash of everything that the features depend on, as 16 hex digits."""
    settings = (config.features, config.components, config.seed, config.batch_size, config.features_path)
    files = {path.name: checksum(path) for path in list_files(shards)}
    return fingerprint("features", settings, files)[:16]


def _load_or_fit_extractor(config: PartitionConfig, shards: Path, folder: Path) -> FeatureExtractor:
    """Load the extractor of an earlier attempt, or fit a new one."""
    if not folder.exists():
        source = shards if config.features_path is None else Path(config.features_path)
        extractor = fit_extractor(config.features, source, config.components, config.seed)
        with atomic_folder(folder) as temporary:
            save_extractor(config.features, extractor, temporary)
    return load_extractor(folder)
