"""Do samples follow their prompts? Two scores, each beside that of real held-out images.

    real images: features ──ridge──► pooled captions                prompt recall: is the true caption among the best?
                 features ──logistic regression──► class, words     accuracy: does it show what the prompt says?
    samples: features ────────────┘

All maps see features of real images alone, so a sample that only looks right to a network that was trained on samples
gains nothing. Captions are searched in EfficientNet features; classes and words are read from these and from pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from jaxtyping import Bool, Float
from safetensors.numpy import load_file

from data_partition.datasets.captions import has_held_out_words
from ddm_core.artifacts import read_json
from ensemble.config import EvaluationConfig
from ensemble.evaluation.class_probe import ClassProbe, fit_probe
from ensemble.evaluation.feature_space import HeldOutSpace
from ensemble.evaluation.reference import CAPTIONS, PROBE, TRAINING_ROWS
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
    reference.
    """
    encoder = TextEncoder.load(pipeline_folder)
    if encoder is None or not (reference / CAPTIONS).is_file():
        return None
    captions, training = read_json(reference / CAPTIONS), load_file(reference / TRAINING_ROWS)
    real = HeldOutSpace.load(reference / f"{RANKED_SPACE}.safetensors").features
    candidates = [caption for caption in dict.fromkeys(captions["held_out"]) if caption]
    search = _CaptionSearch.fit(encoder, captions["training"], training["features"], candidates)
    judge = _Judge.fit(training, real)
    samples = judge.join(features[RANKED_SPACE], features[PROBE])
    is_new = np.array([has_held_out_words(caption, config.new_combinations) for caption in prompts.captions])
    real_labels = np.concatenate([training["labels"], np.load(reference / "labels.npy", allow_pickle=False)])
    kinds = judge.compare(real_labels, np.array(prompts.class_ids), samples, is_new)
    attributes = {}
    for name, words in config.attributes.items():
        known = [_find_word(caption, words) for caption in (*captions["training"], *captions["held_out"])]
        asked = [_find_word(caption, words) for caption in prompts.captions]
        shares = judge.compare(np.array(known), np.array(asked), samples, is_new)
        if shares is not None:
            attributes[name] = shares
    return TextScores(
        captions=len(candidates),
        recall=search.recall(prompts.captions, features[RANKED_SPACE]),
        recall_real=search.recall(captions["held_out"], real),
        recall_chance=min(1.0, RECALL_RANK / len(candidates)),
        class_accuracy=None if kinds is None else kinds.samples,
        class_accuracy_real=None if kinds is None else kinds.real,
        class_accuracy_new=None if kinds is None else kinds.new,
        attributes=attributes,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judge:
    """Features of real images, training ones first, to which probes of their words and classes are fitted."""

    features: Float[np.ndarray, "image joined"]
    is_held_out: Bool[np.ndarray, " image"]
    scales: tuple[float, float]
    """Divisors of the features that rank and of those of pixels: both get the same spread."""

    @classmethod
    def fit(cls, training: Mapping[str, np.ndarray], held_out: np.ndarray) -> "_Judge":
        """Join the features of training and held-out images."""
        scales = (float(training["features"].std()), float(training["pixels"].std()))
        first, second = (
            np.concatenate([ours, theirs]) / scale
            for ours, theirs, scale in zip(
                (training["features"], training["pixels"]),
                (held_out, training["held_out_pixels"]),
                scales,
                strict=True,
            )
        )
        is_held_out = np.arange(len(first)) >= len(training["features"])
        return cls(features=np.concatenate([first, second], axis=1), is_held_out=is_held_out, scales=scales)

    def join(self, ranked: np.ndarray, pixels: np.ndarray) -> np.ndarray:
        """Return the features of other images as probes read them."""
        return np.concatenate([ranked / self.scales[0], pixels / self.scales[1]], axis=1)

    def compare(
        self, labels: np.ndarray, asked: np.ndarray, samples: np.ndarray, is_new: np.ndarray
    ) -> AttributeScores | None:
        """Return the shares of samples and of held-out images that a probe gives their label; -1 has none.

        The probe of samples knows all real images, also those of new combinations. Each half of the held-out images
        is judged by a probe that knows the others. Returns None unless there are two labels, asked for and held out.
        """
        has_label = labels >= 0
        if not (asked >= 0).any() or len(np.unique(labels[has_label & self.is_held_out])) < 2:
            return None
        half = np.arange(len(labels)) % 2
        folds = [self.is_held_out & has_label & (half == number) for number in (0, 1)]
        is_right = np.concatenate(
            [self._probe(labels, ~fold).predict(self.features[fold]) == labels[fold] for fold in folds]
        )
        right = self._probe(labels, np.ones(len(labels), bool)).predict(samples) == asked
        new = right[is_new & (asked >= 0)]
        return AttributeScores(
            samples=float(right[asked >= 0].mean()),
            real=float(is_right.mean()),
            new=float(new.mean()) if len(new) else None,
        )

    def _probe(self, labels: np.ndarray, rows: np.ndarray) -> ClassProbe:
        """Fit a probe to the labelled images among `rows`."""
        known = rows & (labels >= 0)
        return fit_probe(self.features[known], labels[known])


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
