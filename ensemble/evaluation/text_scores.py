"""Do samples follow their prompts? Two scores, each beside that of real held-out images.

    real training images: features ──ridge──► pooled captions         prompt recall: is the true caption among the best?
                          features ──logistic regression──► classes   class accuracy: is it the class of the prompt?
    samples, held-out images: features ──────────┘

Both maps see EfficientNet features of real images alone, so a sample that only looks like its class to a network that
was trained on samples gains nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.numpy import load_file

from data_partition.datasets.captions import has_held_out_words
from ddm_core.artifacts import read_json
from ensemble.config import EvaluationConfig
from ensemble.evaluation.class_probe import fit_probe
from ensemble.evaluation.feature_space import HeldOutSpace
from ensemble.evaluation.reference import CAPTIONS, TRAINING_ROWS
from ensemble.evaluation.scores import AttributeScores, TextScores
from ensemble.evaluation.spaces import RANKED_SPACE
from ensemble.sampling.prompts import Prompts
from experts.conditions.text_encoder import TextEncoder

RECALL_RANK: Final = 20
"""A caption counts as found if it is among this many."""
STRENGTHS: Final = tuple(10.0**power for power in range(7))
"""Regularization of the ridge, chosen by leaving one image out."""

Features = Float[np.ndarray, "image feature"]
Labels = Sequence[int] | Int[np.ndarray, "..."]


def compare_prompts(
    reference: Path, pipeline_folder: Path, prompts: Prompts, features: Features, config: EvaluationConfig
) -> TextScores | None:
    """Compare samples with the held-out images' classes and captions that they were generated for.

    `features` are theirs in the space that ranks.

    Returns None without text, in the pipeline or the reference.
    """
    encoder = TextEncoder.load(pipeline_folder)
    if encoder is None or not (reference / CAPTIONS).is_file():
        return None
    captions, training = read_json(reference / CAPTIONS), load_file(reference / TRAINING_ROWS)
    real = HeldOutSpace.load(reference / f"{RANKED_SPACE}.safetensors").features
    held_out = Prompts(tuple(np.load(reference / "labels.npy").tolist()), tuple(captions["held_out"]))
    candidates = [caption for caption in dict.fromkeys(held_out.captions) if caption]
    search = _CaptionSearch.fit(encoder, captions["training"], training["features"], candidates)
    is_new = np.array([has_held_out_words(caption, config.new_combinations) for caption in prompts.captions])
    images = ((prompts, features), (held_out, real), (prompts.select(is_new), features[is_new]))
    accuracies = [
        _accuracy(training["features"], training["labels"], asked.class_ids, shown) for asked, shown in images
    ]
    attributes = {}
    for name, words in config.attributes.items():
        known = np.array([_find_word(caption, words) for caption in captions["training"]])
        shares = [
            _accuracy(training["features"], known, [_find_word(caption, words) for caption in asked.captions], shown)
            for asked, shown in images
        ]
        if shares[0] is not None and shares[1] is not None:
            attributes[name] = AttributeScores(samples=shares[0], real=shares[1], new=shares[2])
    return TextScores(
        captions=len(candidates),
        recall=search.recall(prompts.captions, features),
        recall_real=search.recall(held_out.captions, real),
        recall_chance=min(1.0, RECALL_RANK / len(candidates)),
        class_accuracy=accuracies[0],
        class_accuracy_real=accuracies[1],
        class_accuracy_new=accuracies[2],
        attributes=attributes,
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
        from sklearn.linear_model import RidgeCV  # seconds to import, and only runs with text need it

        rows = [row for row, caption in enumerate(captions) if caption]
        pooled = _encode(encoder, [captions[row] for row in rows])
        mean = pooled.mean(0)
        ridge = RidgeCV(alphas=STRENGTHS).fit(features[rows].astype(np.float64), pooled - mean)
        directions = _encode(encoder, candidates) - mean
        return cls(
            slopes=ridge.coef_,
            offsets=ridge.intercept_,
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


def _find_word(caption: str, words: Sequence[str]) -> int:
    """Return the position of the first of these words that a caption has, -1 for none."""
    has = set(caption.lower().split())
    return next((number for number, word in enumerate(words) if word.lower() in has), -1)


def _accuracy(
    features: Float[np.ndarray, "training feature"], labels: Labels, asked: Labels, shown: Features
) -> float | None:
    """Return the accuracy of a probe, fitted to real features and labels, on images that were asked for.

    Rows with -1 have no label. Returns None if there are fewer than two labels to tell apart, or none is asked for.
    """
    known, wanted = np.asarray(labels), np.asarray(asked)
    if len(np.unique(known[known >= 0])) < 2 or not (wanted >= 0).any():
        return None
    probe = fit_probe(features[known >= 0], known[known >= 0])
    return float((probe.predict(shown[wanted >= 0]) == wanted[wanted >= 0]).mean())
