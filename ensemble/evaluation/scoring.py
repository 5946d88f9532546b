"""Score any images against a reference folder; `evaluate.py` samples them."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from pydantic import TypeAdapter

from data_partition.features.extract import load_extractor
from data_partition.partition import load_partition
from ddm_core.artifacts import read_json, to_jsonable
from ensemble.config import EvaluationConfig
from ensemble.evaluation.class_probe import ClassProbe
from ensemble.evaluation.feature_space import HeldOutSpace
from ensemble.evaluation.metrics import coverage, shares, total_variation, total_variation_floor
from ensemble.evaluation.near_copies import NearNeighborRate, near_neighbor_rate
from ensemble.evaluation.nearest_neighbors import nearest_distances
from ensemble.evaluation.reference import PROBE, EvaluationError, extract_rows
from ensemble.evaluation.scores import ClassScores, ClusterScores, Distances, SpaceScores
from ensemble.evaluation.spaces import PIXELS

BATCH_IMAGES = 256
"""Images whose features are computed at once."""

COPY_QUANTILE = 0.01
"""A sample nearer to the training set than this share of held-out images is near: the first quantile of an audit."""

Images = UInt8[np.ndarray, "batch height width channel"]
Features = Float[np.ndarray, "batch feature"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractedFeatures:
    """Features of images in every space of a reference, all pixels and what the class probe reads."""

    spaces: dict[str, Features]
    flops: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A reference folder, built for one configuration."""

    folder: Path
    config: EvaluationConfig
    """The requested configuration, fitted to the size of the data set."""
    statistics: dict[str, Any]
    """The content of `reference.json`."""

    @classmethod
    def load(cls, folder: Path, config: EvaluationConfig) -> "Reference":
        """Load a reference; raise `EvaluationError` if it was built for another configuration."""
        statistics = read_json(folder / "reference.json")
        built, requested = statistics.get("config", {}), to_jsonable(config)
        differing = sorted(key for key in requested if key != "conditional" and built.get(key) != requested[key])
        if differing:
            raise EvaluationError(
                f"{folder} was built for another configuration, so its floors do not hold: "
                + ", ".join(f"{key} is {requested[key]}, was {built.get(key)}" for key in differing)
                + "; build the reference again"
            )
        fitted = TypeAdapter(EvaluationConfig).validate_python(statistics["fitted"])
        return cls(folder=folder, config=replace(fitted, conditional=config.conditional), statistics=statistics)

    def compare_space(self, name: str, features: Features) -> SpaceScores:
        """Return the distances in one feature space, with those of real images and of the codec."""
        held_out = HeldOutSpace.load(self.folder / f"{name}.safetensors")
        known = {role: Distances(**values) for role, values in self.statistics["spaces"][name].items()}
        samples = asdict(held_out.compare(features, self.config.neighbours))
        return SpaceScores(**samples, floor=known["floor"], codec=known["codec"])

    def compare_classes(self, features: Features) -> ClassScores | None:
        """Compare the class shares of the images; return None if the data have no labels."""
        probe = self.statistics["probe"]
        if probe is None:
            return None
        counts = ClassProbe.load(self.folder / "probe.safetensors").counts(features, self.statistics["classes"])
        real_counts = np.array(probe["counts"], np.float64)
        return ClassScores(
            coverage=coverage(counts, real_counts),
            tv=total_variation(counts, real_counts),
            tv_floor=total_variation_floor(real_counts, len(features)),
            probe_accuracy=probe["accuracy"],
        )

    def find_copies(self, pixels: Features) -> NearNeighborRate:
        """Return how many rows of pixels are nearer to a training image than almost all held-out images."""
        return near_neighbor_rate(*self.copy_distances(pixels), COPY_QUANTILE)

    def copy_distances(self, pixels: Features) -> tuple[Float[np.ndarray, " batch"], Float[np.ndarray, " held_out"]]:
        """Return the distances to the nearest training image, of rows of pixels and of held-out images."""
        training = np.load(self.folder / "neighbours.npy", mmap_mode="r", allow_pickle=False)
        held_out = np.load(self.folder / "held_out_distances.npy", allow_pickle=False)
        return nearest_distances(pixels, training), held_out

    def extract(self, images: Images) -> ExtractedFeatures:
        """Extract features of the images in every space of the reference."""
        features, flops = {}, 0.0
        for name in dict.fromkeys((*self.config.spaces, PIXELS, PROBE)):
            extractor = None if name == PIXELS else load_extractor(self.folder / "extractors" / name)
            features[name] = np.concatenate([extract_rows(extractor, batch) for batch in _batches(images)])
            flops += extractor.flops_per_image * len(images) if extractor else 0.0
        return ExtractedFeatures(spaces=features, flops=flops)


def compare_clusters(partition: Path, images: Images) -> ClusterScores:
    """Compare the cluster shares of the images; the partition assigns them as it assigned the held-out images."""
    loaded = load_partition(partition)
    assigned = np.concatenate([loaded.assign_images(batch) for batch in _batches(images)])
    counts = np.bincount(assigned, minlength=loaded.num_clusters).astype(np.float64)
    real_counts = np.array(read_json(partition / "balance.json")["holdout_looks"], np.float64)
    return ClusterScores(
        tv=total_variation(counts, real_counts),
        tv_floor=total_variation_floor(real_counts, len(images)),
        shares=tuple(shares(counts).tolist()),
        data_shares=tuple(shares(real_counts).tolist()),
    )


def _batches(images: Images) -> Iterator[Images]:
    for start in range(0, len(images), BATCH_IMAGES):
        yield images[start : start + BATCH_IMAGES]
