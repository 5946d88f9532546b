"""Samples of one expert alone, as soon as it has a checkpoint, and at some later ones."""

from math import isqrt
from pathlib import Path

from ensemble.config import SamplingConfig
from ensemble.ensemble import Ensemble
from ensemble.pipeline import EnsemblePipeline
from ensemble.sampling.images import image_grid
from experts.codecs.registry import load_codec
from experts.config import TrainingConfig
from experts.expert import Expert
from router.config import SelectionConfig

COUNT, STEPS = 16, 10

MAX_SHARE = 0.01
"""Largest number of forward calls on a sample, relative to the training's."""


MAX_PICTURES = 6


def picture_steps(training: TrainingConfig) -> tuple[int, ...]:
    """Return the checkpoints to sample at, evenly spread: as many as cost a hundredth of the training, or none.

    One step of the training counts as three calls on each sample of its batch. The end is a checkpoint.
    """
    affordable = MAX_SHARE * 3 * training.steps * training.batch_size / (COUNT * STEPS)
    saved = [*range(training.checkpoint_every, training.steps, training.checkpoint_every), training.steps]
    count = min(MAX_PICTURES, int(affordable), len(saved))
    return tuple(saved[round(place * (len(saved) - 1) / max(1, count - 1))] for place in range(count))


def write_first_samples(expert: Expert, codec: Path, training: TrainingConfig, out: Path) -> None:
    """Sample from an expert without a condition, and write one picture to `out`."""
    ensemble = Ensemble(experts={0: expert}, noise_schedule=expert.noise_schedule, t_shift=expert.t_shift)
    pipeline = EnsemblePipeline(ensemble=ensemble, codec=load_codec(codec))
    selection = SelectionConfig(name="full")
    sampling = SamplingConfig(solver="euler", steps=STEPS, selection=selection, device=training.device)
    image_grid(pipeline(range(COUNT), sampling).images, columns=isqrt(COUNT)).save(out)
