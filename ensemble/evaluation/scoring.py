"""Scores of any images against a reference folder; sampling is `evaluate.py`'s business."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
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
from ensemble.evaluation.feature_space import RealSpace, scaled
from ensemble.evaluation.metrics import (
    coverage,
    nearest_neighbour_ratio,
    shares,
    total_variation,
    total_variation_floor,
)
from ensemble.evaluation.reference import PIXELS, EvaluationError
from ensemble.evaluation.scores import ClassScores, ClusterScores, Distances, SpaceScores

BATCH_IMAGES = 256
"""Images whose features are computed at once."""

Images = UInt8[np.ndarray, "batch height width channel"]
Features = Float[np.ndarray, "batch feature"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Extracted:
    """Features of images in every space of a reference."""

    spaces: dict[str, Features]
    flops: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A reference folder that was made for one configuration."""

    folder: Path
    config: EvaluationConfig
    """What was asked for, fitted to the size of the data set."""
    found: dict[str, Any]
    """What `reference.json` says."""

    @classmethod
    def load(cls, folder: Path, config: EvaluationConfig) -> "Reference":
        """Raises `EvaluationError` if the reference was made for another configuration."""
        found = read_json(folder / "reference.json")
        made_for, asked = found.get("config", {}), to_jsonable(config)
        differing = sorted(key for key in asked if key != "conditional" and made_for.get(key) != asked[key])
        if differing:
            raise EvaluationError(
                f"{folder} was made for another configuration, so its floors do not hold: "
                + ", ".join(f"{key} is {asked[key]}, was {made_for.get(key)}" for key in differing)
                + "; build the reference again"
            )
        fitted = TypeAdapter(EvaluationConfig).validate_python(found["fitted"])
        return cls(folder=folder, config=replace(fitted, conditional=config.conditional), found=found)

    def score_space(self, name: str, features: Features) -> SpaceScores:
        """Distances in one feature space, with the floor beside them."""
        real = RealSpace.load(self.folder / f"{name}.safetensors")
        floor = Distances(**self.found["spaces"][name]["floor"])
        return SpaceScores.beside(real.compare(features, self.config.neighbours), floor)

    def score_classes(self, features: Features) -> ClassScores | None:
        """Which classes the images show; None where the data have no labels."""
        probe = self.found["probe"]
        if probe is None:
            return None
        seen = ClassProbe.load(self.folder / "probe.safetensors").counts(features, self.found["classes"])
        real = np.array(probe["counts"], np.float64)
        return ClassScores(
            coverage=coverage(seen, real),
            tv=total_variation(seen, real),
            tv_floor=total_variation_floor(real, len(features)),
            probe_accuracy=probe["accuracy"],
        )

    def nearest_ratio(self, features: Features) -> float:
        """Nearness to the training images, in the pixels space, over that of held-out images."""
        training = np.load(self.folder / "neighbours.npy", allow_pickle=False)
        return nearest_neighbour_ratio(features, training, self.found["nearest_distance"])

    def extract(self, images: Images) -> Extracted:
        """Features of the images in every space of the reference."""
        found, flops = {}, 0.0
        for name in dict.fromkeys((*self.config.spaces, PIXELS)):
            extractor = load_extractor(self.folder / "extractors" / name)
            found[name] = scaled(np.concatenate([extractor(batch) for batch in _batches(images)]))
            flops += extractor.flops_per_image * len(images)
        return Extracted(spaces=found, flops=flops)


def score_clusters(partition: Path, images: Images) -> ClusterScores:
    """How the images spread over the clusters, by the same rule that divided the held-out images."""
    division = load_partition(partition)
    clusters = division.num_clusters
    assigned = np.concatenate([division.assign_images(batch) for batch in _batches(images)])
    seen = np.bincount(assigned, minlength=clusters).astype(np.float64)
    real = np.array(read_json(partition / "balance.json")["holdout_looks"], np.float64)
    return ClusterScores(
        tv=total_variation(seen, real),
        tv_floor=total_variation_floor(real, len(images)),
        shares=tuple(shares(seen).tolist()),
        data_shares=tuple(shares(real).tolist()),
    )


def _batches(images: Images) -> Iterator[Images]:
    for start in range(0, len(images), BATCH_IMAGES):
        yield images[start : start + BATCH_IMAGES]
