"""The classes and captions of a reference's held-out images, as prompts."""

from pathlib import Path

import numpy as np

from ddm_core.artifacts import read_json
from ensemble.evaluation.reference import CAPTIONS, EvaluationError
from ensemble.sampling.prompts import Prompts
from experts.conditions.text_encoder import read_text_config


def load_held_out_prompts(reference: Path, count: int, pipeline_folder: Path) -> Prompts:
    """Return what `count` samples are asked for: the captions of the held-out images, without one their classes."""
    return load_held_out_conditions(reference, count, pipeline_folder).by_text()


def load_held_out_conditions(reference: Path, count: int, pipeline_folder: Path) -> Prompts:
    """Return the classes and captions of `count` held-out images, in random order, repeated.

    A pipeline without text gets no captions. Raises `EvaluationError` if no held-out image has a class or a caption.
    """
    labels = np.load(reference / "labels.npy", allow_pickle=False).tolist()
    captions = [""] * len(labels)
    if read_text_config(pipeline_folder) is not None and (reference / CAPTIONS).is_file():
        captions = read_json(reference / CAPTIONS)["held_out"]
    rows = [row for row in zip(labels, captions, strict=True) if row != (-1, "")]
    if not rows:
        raise EvaluationError(
            "conditional samples need classes or captions, and no held-out image has one; set `conditional` to false"
        )
    repeated = [rows[number % len(rows)] for number in range(count)]
    return Prompts(tuple(label for label, _ in repeated), tuple(caption for _, caption in repeated))
