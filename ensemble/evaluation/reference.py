"""Statistics of the real images for every score: computed once per data set, shared by all rows of a table.

    training images ──► extractors, class probe, neighbours ──┐
                   └──► as many as samples: the floor         ├──► reference folder
    held-out images ──► features, radii, axes, labels ────────┘

Samples are compared with held-out images. The same comparison for as many training images is the floor, the score of
a perfect generator.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from data_partition.features.extract import FeatureExtractor, fit_extractor, save_extractor
from data_partition.shards.shards import read_batches, read_index
from ddm_core.artifacts import Preempted, Workspace, write_json
from ddm_core.errors import DDMError
from ensemble.config import MIN_HELD_OUT, EvaluationConfig
from ensemble.evaluation.class_probe import fit_probe
from ensemble.evaluation.feature_space import HeldOutSpace, scale_features
from ensemble.evaluation.metrics import mean_nearest_distance

BATCH_IMAGES = 256
"""Images read per batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RealImages:
    """Features of randomly chosen images, in random order."""

    features: dict[str, Float[np.ndarray, "image feature"]]
    """By the extractor's name; a shorter array covers the first images of a longer one."""
    labels: Int[np.ndarray, " image"]
    """Classes of the images of the longest array, -1 without."""
    flops: float


def read_real_images(
    folder: Path,
    extractors: Mapping[str, FeatureExtractor],
    counts: Mapping[str, int],
    seed: int,
    on_progress: Callable[[int], None],
) -> RealImages:
    """Read the images of a folder of shards in random order, and extract `counts[name]` features of each kind.

    No count exceeds the number of images.
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
            is_included = ranks < len(features[name])
            if is_included.any():
                features[name][ranks[is_included]] = scale_features(extractor(batch.images[is_included]))
        start += len(batch.images)
        on_progress(start)
    flops = sum(extractor.flops_per_image * len(features[name]) for name, extractor in extractors.items())
    return RealImages(features=features, labels=labels[: max(map(len, features.values()))], flops=float(flops))


PIXELS = "pixels"
"""The space of nearest neighbors (copies are equal in appearance, not in content) and of the class probe."""
MAX_HELD_OUT = 10_000
"""Most held-out images, chosen at random."""
MAX_PROBE_IMAGES = 5_000
"""Most training images of the class probe."""
NEIGHBOR_LIMIT = 100_000
"""Most training images in the search for the nearest one; a copy of any other stays undetected."""


class EvaluationError(DDMError, ValueError):
    """Samples and real images cannot be compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceSummary:
    """Size and cost of a reference; its scores are in `reference.json`."""

    held_out: int
    """Held-out images of the comparison."""
    neighbours: int
    """Training images in the search for the nearest one."""
    probe_accuracy: float | None
    flops: float
    """Of the feature extractors."""


def build_reference(dataset: Path, config: EvaluationConfig, out: Path, workspace: Workspace) -> ReferenceSummary:
    """Write the statistics of the real images in `dataset/train` and `dataset/holdout`.

    Raises `EvaluationError` if there are too few held-out images.
    """
    requested, count = config, read_index(dataset / "train").count
    config = fit_config_to(requested, count, read_index(dataset / "holdout").count)
    extractors = _fit_extractors(dataset, config, out)
    training, held_out = _read_both(dataset, extractors, config, workspace)
    spaces: dict[str, Any] = {}
    for name in config.spaces:
        space = HeldOutSpace.fit(held_out.features[name], config.components, config.neighbours)
        space.save(out / f"{name}.safetensors")
        floor = space.compare(training.features[name][: config.num_samples], config.neighbours)
        spaces[name] = {"floor": floor}
    nearest = mean_nearest_distance(held_out.features[PIXELS], training.features[PIXELS])
    np.save(out / "neighbours.npy", training.features[PIXELS], allow_pickle=False)
    np.save(out / "labels.npy", held_out.labels, allow_pickle=False)
    classes = len(read_index(dataset / "train").class_names)
    probe = _write_probe(training, held_out, classes, out) if classes > 1 else None
    summary = ReferenceSummary(
        held_out=len(held_out.labels),
        neighbours=len(training.features[PIXELS]),
        probe_accuracy=probe["accuracy"] if probe else None,
        flops=training.flops
        + held_out.flops
        + sum(count * extractor.fit_flops_per_image for extractor in extractors.values()),
    )
    statistics = {
        "config": requested,
        "fitted": config,
        "spaces": spaces,
        "nearest_distance": nearest,
        "probe": probe,
        "classes": classes,
    }
    write_json(out / "reference.json", statistics | {"summary": summary})
    return summary


def _fit_extractors(dataset: Path, config: EvaluationConfig, out: Path) -> dict[str, FeatureExtractor]:
    """Fit the extractors of all spaces on training images, and write them."""
    extractors: dict[str, FeatureExtractor] = {}
    for name in dict.fromkeys((*config.spaces, PIXELS)):
        extractors[name] = fit_extractor(name, dataset / "train", config.components, config.seed)
        save_extractor(name, extractors[name], out / "extractors" / name)
    return extractors


def _read_both(
    dataset: Path, extractors: dict[str, FeatureExtractor], config: EvaluationConfig, workspace: Workspace
) -> tuple[RealImages, RealImages]:
    """Read as many training images as each use of a space needs, and the held-out images."""
    counts = dict.fromkeys(extractors, config.num_samples) | {PIXELS: NEIGHBOR_LIMIT}
    progress = _progress(workspace, read_index(dataset / "train").count, read_index(dataset / "holdout").count)
    training = read_real_images(dataset / "train", extractors, counts, config.seed, progress[0])
    limits = dict.fromkeys(extractors, MAX_HELD_OUT)
    held_out = read_real_images(dataset / "holdout", extractors, limits, config.seed, progress[1])
    return training, held_out


def _progress(workspace: Workspace, *counts: int) -> list[Callable[[int], None]]:
    """Return one progress function per folder, in reading order; each raises `Preempted` on a stop request."""

    def reporter(before: int) -> Callable[[int], None]:
        def report(done: int) -> None:
            workspace.report_progress(before + done, sum(counts), unit="images")
            if workspace.stop_requested():
                raise Preempted(f"stopped after {before + done} real images; reading restarts from the first")

        return report

    return [reporter(sum(counts[:number])) for number in range(len(counts))]


def _write_probe(training: RealImages, held_out: RealImages, classes: int, out: Path) -> dict[str, Any]:
    """Fit and write the class probe; return its accuracy and counts on the held-out images."""
    features = training.features[PIXELS][:MAX_PROBE_IMAGES]
    probe = fit_probe(features, training.labels[: len(features)])
    probe.save(out / "probe.safetensors")
    predicted: Int[np.ndarray, " held_out"] = probe.predict(held_out.features[PIXELS])
    return {
        "accuracy": float((predicted == held_out.labels).mean()),
        "counts": np.bincount(predicted, minlength=classes).tolist(),
    }


def fit_config_to(config: EvaluationConfig, training: int, held_out: int) -> EvaluationConfig:
    """Return the configuration with its counts reduced to the size of the data set."""
    if held_out < MIN_HELD_OUT:
        raise EvaluationError(
            f"scores need {MIN_HELD_OUT} held-out images, the data set has {held_out}; raise data.holdout or add images"
        )
    num_samples = min(config.num_samples, training)
    return replace(config, num_samples=num_samples, components=min(config.components, held_out // 2, num_samples // 2))
