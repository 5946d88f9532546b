"""Statistics of the real images for every score: computed once per data set, shared by all rows of a table.

    training images ──► extractors, class probe, neighbours ──┐
                   └──► as many as samples: the floor         ├──► reference folder
    held-out images ──► features, radii, axes, labels ────────┤
                   └──► codec ──► the same features ──────────┘

Samples are compared with held-out images. The same comparison for as many training images is the floor, the score of
a perfect generator. With the held-out images behind the codec it is the codec's own distance, the score of perfect
networks; a lossless codec has that of the floor.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from data_partition.datasets.captions import find_word
from data_partition.features.extract import FeatureExtractor, fit_extractor, save_extractor
from data_partition.features.fit_sample import count_fit_images
from data_partition.features.pixels import flatten_pixels
from data_partition.shards.shards import read_batches, read_index
from ddm_core.artifacts import Preempted, Workspace, save_arrays, write_json
from ddm_core.errors import DDMError
from ensemble.config import MIN_HELD_OUT, EvaluationConfig
from ensemble.evaluation.class_probe import WordProbes, fit_probe
from ensemble.evaluation.feature_space import HeldOutSpace, scale_features
from ensemble.evaluation.nearest_neighbors import nearest_distances
from ensemble.evaluation.scores import Distances
from ensemble.evaluation.spaces import PIXELS, RANKED_SPACE
from ensemble.sampling.images import to_bytes
from experts.codec import Codec
from experts.codecs.registry import load_codec

log = logging.getLogger(__name__)

Images = UInt8[np.ndarray, "batch height width channel"]

BATCH_IMAGES = 256
"""Images read per batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RealImages:
    """Features of randomly chosen images, in random order."""

    features: dict[str, Float[np.ndarray, "image feature"]]
    """By the extractor's name; a shorter array covers the first images of a longer one."""
    labels: Int[np.ndarray, " labelled"]
    """Classes of the images of the longest array, -1 without."""
    captions: list[str]
    """Captions of the same images, empty without."""
    flops: float


def read_real_images(
    folder: Path,
    extractors: Mapping[str, FeatureExtractor],
    counts: Mapping[str, int],
    seed: int,
    on_progress: Callable[[int], None],
    change: Callable[[Images], Images] = lambda images: images,
) -> RealImages:
    """Read the images of a folder of shards in random order, and extract `counts[name]` features of each kind.

    No count exceeds the number of images. `PIXELS` needs no extractor. Features are those of the changed images.
    """
    total = read_index(folder).count
    rank = np.empty(total, np.int64)
    rank[np.random.default_rng(seed).permutation(total)] = np.arange(total)
    features: dict[str, Float[np.ndarray, "image feature"]] = {}
    labels, captions = np.empty(total, np.int64), [""] * total
    start = 0
    for batch in read_batches(folder, BATCH_IMAGES):
        ranks = rank[start : start + len(batch.images)]
        labels[ranks] = batch.labels
        for image_rank, caption in zip(ranks.tolist(), batch.captions, strict=True):
            captions[image_rank] = caption
        images = change(batch.images)
        for name, count in counts.items():
            is_included = ranks < count
            if is_included.any():
                rows = extract_rows(extractors.get(name), images[is_included])
                kept = features.setdefault(name, np.empty((min(count, total), rows.shape[1]), np.float32))
                kept[ranks[is_included]] = rows
        start += len(batch.images)
        on_progress(start)
    flops = sum(extractor.flops_per_image * len(features[name]) for name, extractor in extractors.items())
    longest = max(map(len, features.values()))
    return RealImages(features=features, labels=labels[:longest], captions=captions[:longest], flops=float(flops))


def extract_rows(extractor: FeatureExtractor | None, images: Images) -> Float[np.ndarray, "image feature"]:
    """Return the scaled features of images; without an extractor, all their pixels."""
    return flatten_pixels(images) if extractor is None else scale_features(extractor(images))


CAPTIONS, TRAINING_ROWS, WORD_PROBES = "captions.json", "training.safetensors", "word_probes.safetensors"
"""Captions of the training and the held-out images; features of the former, in the space that ranks; what reads classes
and words from images."""
CLASS = "class"
"""Name of the probe of classes."""
PROBE = "probe"
"""Principal components of the pixels, from which the class probe predicts."""
MAX_HELD_OUT = 5_000
"""Most held-out images, chosen at random."""
MAX_THRESHOLD_IMAGES = 2_000
"""Most held-out images whose distances to the training set are the thresholds of a copy."""
LOSSY = 2.0
"""Distance of the codec over the floor above which the log warns."""
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


def build_reference(
    dataset: Path, codec: Path, config: EvaluationConfig, out: Path, workspace: Workspace
) -> ReferenceSummary:
    """Write the statistics of the real images in `dataset/train` and `dataset/holdout`, and of the codec.

    Raises `EvaluationError` if there are too few held-out images.
    """
    requested, count = config, read_index(dataset / "train").count
    config = fit_config_to(requested, count, read_index(dataset / "holdout").count)
    extractors = _fit_extractors(dataset, config, out)
    training, held_out, decoded = _read_all(dataset, load_codec(codec), extractors, config, workspace)
    spaces: dict[str, dict[str, Distances]] = {}
    for name in config.spaces:
        space = HeldOutSpace.fit(name, held_out.features[name], config.components, config.neighbours)
        space.save(out / f"{name}.safetensors")
        others = training.features[name][: config.num_samples]
        spaces[name] = {
            "floor": space.compare(others, config.neighbours),
            "codec": space.with_features(others, config.neighbours).compare(decoded.features[name], config.neighbours),
        }
    warn_if_lossy(spaces)
    neighbours = np.rint(training.features[PIXELS] * 255).astype(np.uint8)
    np.save(out / "neighbours.npy", neighbours, allow_pickle=False)
    decoded_rows = decoded.features[PIXELS][:MAX_THRESHOLD_IMAGES]
    np.save(out / "held_out_distances.npy", nearest_distances(decoded_rows, neighbours), allow_pickle=False)
    np.save(out / "labels.npy", held_out.labels, allow_pickle=False)
    if any(training.captions) and RANKED_SPACE in config.spaces:
        _write_captions(training, held_out, config.attributes, out)
    elif any(held_out.captions):
        write_json(out / CAPTIONS, {"training": [], "held_out": held_out.captions})
    classes = len(read_index(dataset / "train").class_names)
    probe = _write_probe(training, held_out, classes, out) if classes > 1 else None
    summary = ReferenceSummary(
        held_out=len(held_out.labels),
        neighbours=len(neighbours),
        probe_accuracy=probe["accuracy"] if probe else None,
        flops=training.flops
        + held_out.flops
        + decoded.flops
        + sum(count_fit_images(count) * extractor.fit_flops_per_image for extractor in extractors.values()),
    )
    statistics = {"config": requested, "fitted": config, "spaces": spaces, "probe": probe, "classes": classes}
    write_json(out / "reference.json", statistics | {"summary": summary})
    return summary


def pass_through(codec: Codec, images: Images) -> Images:
    """Return the images after the codec, as samples leave it."""
    return to_bytes(codec.decode(codec.encode(images)))


def warn_if_lossy(spaces: Mapping[str, Mapping[str, Distances]]) -> None:
    """Log that no network can make up for the codec, if its distance is far above that of real images."""
    distances = spaces.get(RANKED_SPACE)
    if distances and distances["codec"].fd > LOSSY * distances["floor"].fd:
        log.warning(
            "the codec alone has a Fréchet distance of %.0f, and real images of %.0f: no network can make its samples "
            "better than that; give the codec more components before you train for longer",
            distances["codec"].fd,
            distances["floor"].fd,
        )


def _fit_extractors(dataset: Path, config: EvaluationConfig, out: Path) -> dict[str, FeatureExtractor]:
    """Fit the extractors of the probe and of all spaces but pixels on training images, and write them."""
    extractors: dict[str, FeatureExtractor] = {}
    for name in (*(name for name in config.spaces if name != PIXELS), PROBE):
        kind = "pixels" if name == PROBE else name
        extractors[name] = fit_extractor(kind, dataset / "train", config.components, config.seed)
        save_extractor(kind, extractors[name], out / "extractors" / name)
    return extractors


def _read_all(
    dataset: Path,
    codec: Codec,
    extractors: Mapping[str, FeatureExtractor],
    config: EvaluationConfig,
    workspace: Workspace,
) -> tuple[RealImages, RealImages, RealImages]:
    """Read as many training images as each use of a space needs, the held-out images, and these after the codec."""
    train, held_out = dataset / "train", dataset / "holdout"
    counts = dict.fromkeys(extractors, config.num_samples) | {PIXELS: NEIGHBOR_LIMIT, PROBE: MAX_PROBE_IMAGES}
    limits = dict.fromkeys((*extractors, PIXELS), MAX_HELD_OUT)
    sizes = [read_index(folder).count for folder in (train, held_out, held_out)]
    progress = _progress(workspace, *sizes)
    decoding = partial(pass_through, codec)
    return (
        read_real_images(train, extractors, counts, config.seed, progress[0]),
        read_real_images(held_out, extractors, limits, config.seed, progress[1]),
        read_real_images(held_out, extractors, limits, config.seed, progress[2], decoding),
    )


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
    features = training.features[PROBE]
    probe = fit_probe(features, training.labels[: len(features)])
    probe.save(out / "probe.safetensors")
    predicted: Int[np.ndarray, " held_out"] = probe.predict(held_out.features[PROBE])
    return {
        "accuracy": float((predicted == held_out.labels).mean()),
        "counts": np.bincount(predicted, minlength=classes).tolist(),
    }


def _write_captions(
    training: RealImages, held_out: RealImages, attributes: Mapping[str, Sequence[str]], out: Path
) -> None:
    """Write what the scores of text need: see `text_scores.py`."""
    count = min(len(training.features[RANKED_SPACE]), len(training.features[PROBE]))
    save_arrays(out / TRAINING_ROWS, {"features": training.features[RANKED_SPACE][:count]})
    captions = {"training": training.captions[:count], "held_out": held_out.captions}
    write_json(out / CAPTIONS, captions)
    labels = {CLASS: np.concatenate([training.labels[:count], held_out.labels])}
    for name, words in attributes.items():
        labels[attribute_probe(name)] = np.array(
            [find_word(caption, words) for caption in (*captions["training"], *captions["held_out"])]
        )
    spaces = [(images.features[RANKED_SPACE], images.features[PROBE]) for images in (training, held_out)]
    WordProbes.fit((spaces[0][0][:count], spaces[0][1][:count]), spaces[1], labels).save(out / WORD_PROBES)


def attribute_probe(name: str) -> str:
    """Return the name of the probe of an attribute."""
    return f"attribute {name}"


def fit_config_to(config: EvaluationConfig, training: int, held_out: int) -> EvaluationConfig:
    """Return the configuration with its counts reduced to the size of the data set."""
    if held_out < MIN_HELD_OUT:
        raise EvaluationError(
            f"scores need {MIN_HELD_OUT} held-out images, the data set has {held_out}; raise data.holdout or add images"
        )
    num_samples = min(config.num_samples, training)
    return replace(config, num_samples=num_samples, components=min(config.components, held_out // 2, num_samples // 2))
