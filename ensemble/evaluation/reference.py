"""The real side of every score, computed once for a data set: an artifact that all rows of a table share.

    training images ──► extractors, class probe, neighbours ──┐
                   └──► as many as samples: the floor         ├──► reference folder
    held-out images ──► features, radii, axes, labels ────────┘

Samples are compared with held-out images. The same comparison for as many training images is the floor:
what a perfect generator would score.
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
from ensemble.config import EvaluationConfig
from ensemble.evaluation.class_probe import fit_probe
from ensemble.evaluation.feature_space import RealSpace, scaled
from ensemble.evaluation.metrics import mean_nearest_distance

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


PIXELS = "pixels"
"""The space of nearest neighbours (what a copy looks like, not what it shows) and of the class probe."""
HELD_OUT_LEAST = 16
"""Held-out images without which a metric has no meaning."""
HELD_OUT_LIMIT = 10_000
"""Held-out images at most, drawn at random."""
PROBE_LIMIT = 5_000
"""Training images at most from which the class probe learns."""
NEIGHBOUR_LIMIT = 100_000
"""Training images at most among which the nearest is looked for; a copy of any other goes unseen."""


class EvaluationError(ValueError):
    """Samples and real images cannot be compared as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceStatistics:
    """What a reference holds; its scores are in `reference.json`."""

    held_out: int
    """Held-out images that samples are compared with."""
    neighbours: int
    """Training images among which the nearest is looked for."""
    probe_accuracy: float | None
    flops: float
    """Counted work of the feature extractors."""


def build_reference(dataset: Path, config: EvaluationConfig, out: Path, workspace: Workspace) -> ReferenceStatistics:
    """Write everything that scores need of the real images in `dataset/train` and `dataset/holdout`.

    Raises `EvaluationError` if there are too few held-out images.
    """
    asked, count = config, read_index(dataset / "train").count
    config = fit_extractor_to(asked, count, read_index(dataset / "holdout").count)
    extractors = _fit_extractors(dataset, config, out)
    training, held_out = _read_both(dataset, extractors, config, workspace)
    spaces: dict[str, Any] = {}
    for name in config.spaces:
        space = RealSpace.of(held_out.features[name], config.components, config.neighbours)
        space.save(out / f"{name}.safetensors")
        floor = space.compare(training.features[name][: config.num_samples], config.neighbours)
        spaces[name] = {"floor": floor}
    nearest = mean_nearest_distance(held_out.features[PIXELS], training.features[PIXELS])
    np.save(out / "neighbours.npy", training.features[PIXELS], allow_pickle=False)
    np.save(out / "labels.npy", held_out.labels, allow_pickle=False)
    classes = len(read_index(dataset / "train").class_names)
    probe = _write_probe(training, held_out, classes, out) if classes > 1 else None
    summary = ReferenceStatistics(
        held_out=len(held_out.labels),
        neighbours=len(training.features[PIXELS]),
        probe_accuracy=probe["accuracy"] if probe else None,
        flops=training.flops
        + held_out.flops
        + sum(count * extractor.fit_flops_per_image for extractor in extractors.values()),
    )
    found = {
        "config": asked,
        "fitted": config,
        "spaces": spaces,
        "nearest_distance": nearest,
        "probe": probe,
        "classes": classes,
    }
    write_json(out / "reference.json", found | {"summary": summary})
    return summary


def _fit_extractors(dataset: Path, config: EvaluationConfig, out: Path) -> dict[str, FeatureExtractor]:
    """Fit and write the extractors of all spaces; they see training images only."""
    extractors: dict[str, FeatureExtractor] = {}
    for name in dict.fromkeys((*config.spaces, PIXELS)):
        extractors[name] = fit_extractor(name, dataset / "train", config.components, config.seed)
        save_extractor(name, extractors[name], out / "extractors" / name)
    return extractors


def _read_both(
    dataset: Path, extractors: dict[str, FeatureExtractor], config: EvaluationConfig, workspace: Workspace
) -> tuple[RealImages, RealImages]:
    """Training and held-out images: the former as many as each use of a space needs."""
    counts = dict.fromkeys(extractors, config.num_samples) | {PIXELS: NEIGHBOUR_LIMIT}
    progress = _progress(workspace, read_index(dataset / "train").count, read_index(dataset / "holdout").count)
    training = read_real_images(dataset / "train", extractors, counts, config.seed, progress[0])
    limits = dict.fromkeys(extractors, HELD_OUT_LIMIT)
    held_out = read_real_images(dataset / "holdout", extractors, limits, config.seed, progress[1])
    return training, held_out


def _progress(workspace: Workspace, *counts: int) -> list[Callable[[int], None]]:
    """One function for each folder that is read after the other; each raises `Preempted` on request."""

    def reporter(before: int) -> Callable[[int], None]:
        def report(done: int) -> None:
            workspace.report_progress(before + done, sum(counts), unit="images")
            if workspace.stop_requested():
                raise Preempted(f"stopped after {before + done} real images; reading starts again")

        return report

    return [reporter(sum(counts[:number])) for number in range(len(counts))]


def _write_probe(training: RealImages, held_out: RealImages, classes: int, out: Path) -> dict[str, Any]:
    """Fit and write the class probe; what it says about the held-out images."""
    features = training.features[PIXELS][:PROBE_LIMIT]
    probe = fit_probe(features, training.labels[: len(features)])
    probe.save(out / "probe.safetensors")
    said: Int[np.ndarray, " held_out"] = probe.predict(held_out.features[PIXELS])
    return {
        "accuracy": float((said == held_out.labels).mean()),
        "counts": np.bincount(said, minlength=classes).tolist(),
    }


def fit_extractor_to(config: EvaluationConfig, training: int, held_out: int) -> EvaluationConfig:
    """The configuration with its upper bounds brought down to what a data set of this size can give."""
    if held_out < HELD_OUT_LEAST:
        raise EvaluationError(
            f"scores need {HELD_OUT_LEAST} held-out images, the data set has {held_out}; "
            "raise data.holdout or add images"
        )
    num_samples = min(config.num_samples, training)
    return replace(config, num_samples=num_samples, components=min(config.components, held_out // 2, num_samples // 2))
