"""Validation of one expert alone while it trains: pictures of fixed noise and prompts, and its kernel distance (KID).

The process of the training validates, or one of its own, for which it does not wait:
`python -m ensemble.evaluation.validation FOLDER` reads `FOLDER/task.json` and the expert beside it.
"""

import itertools
import json
import os
import sys
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import numpy as np
import torch

from data_partition.features.efficientnet import EfficientNetFeatures
from ddm_core.artifacts import read_json
from ddm_core.die_with_parent import die_with_parent
from ddm_core.json_values import from_json
from ensemble.config import SamplingConfig, ValidationConfig
from ensemble.ensemble import Ensemble
from ensemble.evaluation.feature_space import scale_features
from ensemble.evaluation.metrics import kernel_distance
from ensemble.pipeline import EnsemblePipeline
from ensemble.sampling.images import image_grid
from ensemble.sampling.prompts import Prompts, find_class
from ensemble.sampling.sample import sample
from experts.codec import Codec
from experts.codecs.registry import load_codec
from experts.conditions.condition import NULL_CLASS
from experts.config import TextConfig, TrainingConfig
from experts.expert import Expert
from experts.training.latents.folder import read_class_names, read_latents, read_record
from router.config import SelectionConfig

COUNT = 16
"""Pictures without prompts; with prompts, one of each."""

MAX_SHARE = 0.01
"""Largest number of forward calls on a sample, relative to the training's, if no steps are chosen."""

MAX_PICTURES = 6

TASK, EXPERT = "task.json", "expert"
"""What a process of its own reads."""

DISTANCE_SEED = 2**20
"""First of the seeds whose samples the distance compares."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationTask:
    """One validation, as a process of its own reads it."""

    config: ValidationConfig
    step: int
    codec: str
    latents: str
    """The samples that the expert trains on, whose classes and texts prompts may name."""
    held_out: str
    """The held-out samples of its cluster; empty if there are none."""
    device: str
    picture: str
    """The file of the pictures."""
    distances: str
    """The file to which a row with the distance is appended."""


def validation_steps(config: ValidationConfig, training: TrainingConfig) -> tuple[int, ...]:
    """Return the checkpoints at which to validate, among them the end, which is a checkpoint too.

    Without `every` they are evenly spread: as many as cost a hundredth of the training, or none. One step of the
    training counts as three calls on each sample of its batch.
    """
    saved = [*range(training.checkpoint_every, training.steps, training.checkpoint_every), training.steps]
    if config.every is not None:
        pairs = itertools.pairwise([0, *saved])
        return tuple(
            step for before, step in pairs if step // config.every > before // config.every or step == saved[-1]
        )
    calls = config.steps * (len(config.prompts) or COUNT)
    count = min(MAX_PICTURES, int(MAX_SHARE * 3 * training.steps * training.batch_size / calls), len(saved))
    return tuple(saved[round(place * (len(saved) - 1) / max(1, count - 1))] for place in range(count))


def validate(expert: Expert, task: ValidationTask) -> None:
    """Write the pictures of an expert, and its distance from held-out images if the configuration wants one.

    Raises `PromptError` for a prompt that it cannot follow, and `MissingExtra` without the network of the distance.
    """
    codec = load_codec(Path(task.codec))
    ensemble = Ensemble(experts={0: expert}, noise_schedule=expert.noise_schedule, t_shift=expert.t_shift)
    pipeline = EnsemblePipeline(
        ensemble=ensemble,
        codec=codec,
        num_classes=expert.num_classes,
        class_names=read_class_names(Path(task.latents)),
        text=_text_config(Path(task.latents)),
    )
    prompts = _to_prompts(task.config.prompts, pipeline) if task.config.prompts else None
    count = COUNT if prompts is None else len(prompts)
    images = pipeline(range(count), _sampling(task, guided=prompts is not None), prompts).images
    if task.config.kid_samples:
        kid, kid_std = measure_distance(ensemble, codec, task)
        with Path(task.distances).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": task.step, "kid": kid, "kid_std": kid_std}) + "\n")
    picture = Path(task.picture)
    unfinished = picture.with_name(f".{picture.name}")
    image_grid(images, columns=isqrt(count)).save(unfinished)
    unfinished.replace(picture)  # last and whole: whoever finds it reads its distance


def measure_distance(ensemble: Ensemble, codec: Codec, task: ValidationTask) -> tuple[float, float]:
    """Return the kernel distance of samples from held-out images under the same conditions, and its standard error.

    The features are EfficientNet-lite0's. Raises `ValueError` with fewer than two held-out samples.
    """
    held_out = read_latents(Path(task.held_out))
    count = min(task.config.kid_samples, len(held_out))
    rows = torch.arange(count) * len(held_out) // count
    condition = held_out.condition(rows) if held_out.has_conditions else None
    seeds = range(DISTANCE_SEED, DISTANCE_SEED + len(rows))
    samples = sample(ensemble, codec, seeds, _sampling(task, guided=condition is not None), condition).images
    features = EfficientNetFeatures.load(Path())
    drawn, real = (
        scale_features(features(images.mul(255).round().to(torch.uint8).numpy()))
        for images in (samples, codec.decode(held_out.select(rows).clean).clamp(0, 1).cpu())
    )
    return kernel_distance(drawn.astype(np.float64), real.astype(np.float64))


def _sampling(task: ValidationTask, *, guided: bool) -> SamplingConfig:
    return SamplingConfig(
        solver="euler",
        steps=task.config.steps,
        guidance_scale=task.config.guidance_scale if guided else 1.0,
        selection=SelectionConfig(name="full"),
        device=task.device,
    )


def _to_prompts(texts: tuple[str, ...], pipeline: EnsemblePipeline) -> Prompts:
    """Return names of classes as classes, and others as captions; raise `PromptError` for what is neither."""
    are_classes = [pipeline.text is None or text in pipeline.class_names for text in texts]
    pairs = list(zip(texts, are_classes, strict=True))
    class_ids = [find_class(text, pipeline.class_names) if is_class else NULL_CLASS for text, is_class in pairs]
    return Prompts(tuple(class_ids), tuple("" if is_class else text for text, is_class in pairs))


def _text_config(latents: Path) -> TextConfig | None:
    recorded = read_record(latents)["origin"].get("text")
    return None if recorded is None else from_json(TextConfig, recorded)


def main(folder: Path) -> None:
    """Validate the expert of a folder while the training lives, with less claim to the processor than it has."""
    die_with_parent()
    os.nice(10)
    validate(Expert.load(folder / EXPERT), from_json(ValidationTask, read_json(folder / TASK)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
