"""Do samples follow their prompts? Two scores, each beside that of real held-out images.

    real images: features ──ridge──► pooled captions                prompt recall: is the true caption among the best?
                 features ──logistic regression──► class, words     accuracy: does it show what the prompt says?
    samples: features ────────────┘

All maps see features of real images alone, so a sample that only looks right to a network that was trained on samples
gains nothing. Captions are searched in EfficientNet features; classes and words are read from these and from pixels, by
probes of the reference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors.numpy import load_file

from data_partition.datasets.captions import find_word, has_held_out_words
from ddm_core.artifacts import read_json
from ensemble.config import EvaluationConfig
from ensemble.evaluation.class_probe import WordProbes
from ensemble.evaluation.feature_space import HeldOutSpace
from ensemble.evaluation.reference import CAPTIONS, CLASS, PROBE, TRAINING_ROWS, WORD_PROBES, attribute_probe
from ensemble.evaluation.scores import AttributeScores, TextScores
from ensemble.evaluation.spaces import RANKED_SPACE
from ensemble.sampling.prompts import Prompts
from experts.conditions.text_encoder import TextEncoder

RECALL_RANK: Final = 20
"""A caption counts as found if it is among this many."""
STRENGTHS: Final = tuple(10.0**power for power in range(7))
"""Regularization of the ridge, chosen by leaving one image out."""

Features = Float[np.ndarray, "image feature"]


def compare_prompts(
    reference: Path,
    pipeline_folder: Path,
    prompts: Prompts,
    features: Mapping[str, Float[np.ndarray, "sample _"]],
    config: EvaluationConfig,
) -> TextScores | None:
    """Compare samples with the held-out images' classes and captions that they were generated for.

    `features` are theirs in the space that ranks and in the probe's. Returns None without text, in the pipeline or the
    reference, and for a reference without the space that ranks.
    """
    encoder = TextEncoder.load(pipeline_folder)
    if encoder is None or not all((reference / name).is_file() for name in (CAPTIONS, TRAINING_ROWS)):
        return None
    captions, training = read_json(reference / CAPTIONS), load_file(reference / TRAINING_ROWS)
    real = HeldOutSpace.load(reference / f"{RANKED_SPACE}.safetensors").features
    candidates = [caption for caption in dict.fromkeys(captions["held_out"]) if caption]
    search = _CaptionSearch.fit(encoder, captions["training"], training["features"], candidates)
    probes, samples = WordProbes.load(reference / WORD_PROBES), (features[RANKED_SPACE], features[PROBE])
    is_new = np.array([has_held_out_words(caption, config.new_combinations) for caption in prompts.captions])

    def compare(name: str, asked: Sequence[int]) -> AttributeScores | None:
        labels = np.array(asked)
        if name not in probes.probes or (labels < 0).all():
            return None
        return _compare_labels(probes.predict(name, samples), labels, is_new, probes.accuracies[name])

    kinds = compare(CLASS, prompts.class_ids)
    attributes = {
        name: compare(attribute_probe(name), [find_word(caption, words) for caption in prompts.captions])
        for name, words in config.attributes.items()
    }
    return TextScores(
        captions=len(candidates),
        recall=search.recall(prompts.captions, features[RANKED_SPACE]),
        recall_real=search.recall(captions["held_out"], real),
        recall_chance=min(1.0, RECALL_RANK / len(candidates)),
        class_accuracy=None if kinds is None else kinds.samples,
        class_accuracy_real=None if kinds is None else kinds.real,
        class_accuracy_new=None if kinds is None else kinds.new,
        attributes={name: shares for name, shares in attributes.items() if shares is not None},
    )


def _compare_labels(
    predicted: Int[np.ndarray, " sample"],
    asked: Int[np.ndarray, " sample"],
    is_new: Bool[np.ndarray, " sample"],
    real: float,
) -> AttributeScores:
    """Return the share of the samples, asked for a label, that show it, beside that of real images."""
    is_right, is_asked = predicted == asked, asked >= 0
    new = is_right[is_new & is_asked]
    return AttributeScores(
        samples=float(is_right[is_asked].mean()), real=real, new=float(new.mean()) if len(new) else None
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _CaptionSearch:
    """A linear map from features to pooled captions, and the captions that are searched."""

    slopes: Float[np.ndarray, "pooled feature"]
    offsets: Float[np.ndarray, " pooled"]
    candidates: Sequence[str]
    directions: Float[np.ndarray, "candidate pooled"]
    """Unit vectors, from the mean of the training captions."""

    @classmethod
    def fit(
        cls, encoder: TextEncoder, captions: Sequence[str], features: Features, candidates: Sequence[str]
    ) -> "_CaptionSearch":
        """Fit the map to the training images that have a caption."""
        rows = [row for row, caption in enumerate(captions) if caption]
        pooled = _encode(encoder, [captions[row] for row in rows])
        mean = pooled.mean(0)
        slopes, offsets = fit_ridge(features[rows].astype(np.float64), pooled - mean)
        directions = _encode(encoder, candidates) - mean
        return cls(
            slopes=slopes,
            offsets=offsets,
            candidates=candidates,
            directions=directions / np.linalg.norm(directions, axis=1, keepdims=True),
        )

    def recall(self, captions: Sequence[str], features: Features) -> float:
        """Return the share of the images with a caption whose caption is among the nearest candidates."""
        positions = {caption: row for row, caption in enumerate(self.candidates)}
        rows = [row for row, caption in enumerate(captions) if caption in positions]
        closeness = (features[rows] @ self.slopes.T + self.offsets) @ self.directions.T
        own = closeness[np.arange(len(rows)), [positions[captions[row]] for row in rows]]
        return float(((closeness > own[:, None]).sum(1) < RECALL_RANK).mean())


def _encode(encoder: TextEncoder, captions: Sequence[str]) -> Float[np.ndarray, "caption pooled"]:
    with torch.inference_mode():
        pooled: Float[np.ndarray, "caption pooled"] = encoder.encode_and_count(captions)[0].pooled.double().numpy()
    return pooled


def fit_ridge(
    features: Float[np.ndarray, "image feature"], targets: Float[np.ndarray, "image target"]
) -> tuple[Float[np.ndarray, "target feature"], Float[np.ndarray, " target"]]:
    """Return slopes and offsets of the ridge whose strength has the least squared error on an image that is left out.

    The error without an image is its residual / (1 - its leverage), so no fit is repeated.
    """
    centers, means = features.mean(0), targets.mean(0)
    centered = features - centers
    values, vectors = np.linalg.eigh(centered.T @ centered)
    rotated = centered @ vectors
    moments = rotated.T @ (targets - means)

    def error(strength: float) -> float:
        leverages = rotated**2 @ (1 / (values + strength)) + 1 / len(features)
        residuals = targets - means - (rotated / (values + strength)) @ moments
        return float(((residuals / (1 - leverages)[:, None]) ** 2).mean())

    slopes = moments.T / (values + min(STRENGTHS, key=error)) @ vectors.T
    return slopes, means - slopes @ centers
