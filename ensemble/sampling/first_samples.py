"""Samples of one expert alone, as soon as it has a checkpoint."""

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


def are_quick(training: TrainingConfig) -> bool:
    """Return whether the samples are a hundredth of the training or less; one of its steps counts as three calls."""
    return MAX_SHARE * 3 * training.steps * training.batch_size >= COUNT * STEPS


def write_first_samples(expert: Expert, codec: Path, training: TrainingConfig, out: Path) -> None:
    """Sample from an expert without a condition, and write one picture to `out`."""
    ensemble = Ensemble(experts={0: expert}, noise_schedule=expert.noise_schedule, t_shift=expert.t_shift)
    pipeline = EnsemblePipeline(ensemble=ensemble, codec=load_codec(codec))
    selection = SelectionConfig(name="full")
    sampling = SamplingConfig(solver="euler", steps=STEPS, selection=selection, device=training.device)
    image_grid(pipeline(range(COUNT), sampling).images, columns=isqrt(COUNT)).save(out)
