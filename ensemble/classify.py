"""`ddm classify`: a pipeline folder as a classifier of held-out images, cluster by cluster."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from artifacts import write_json
from data_partition.shards import Sample, read_index
from ensemble.classifier import (
    Knowledge,
    Latents,
    Times,
    Velocities,
    Voices,
    denoising_errors,
    ensemble_and_experts,
    knowledge,
)
from ensemble.draws import RowFlops
from ensemble.examination_config import ClassifierConfig
from ensemble.nearest import read_rows
from ensemble.pipeline import DDMPipeline, PipelineError
from experts.condition import Condition


def classify(
    pipeline: DDMPipeline,
    partition: Path,
    config: ClassifierConfig,
    out: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """Write `out/classify.json` and return the FLOPs; raises `PipelineError` if there is nothing to classify."""
    if not pipeline.num_classes:
        raise PipelineError(
            "a classifier needs experts that were trained with classes, and these have 0; "
            "use a data set with classes, and data.labels=true"
        )
    folders = [partition / "holdout" / str(k) for k in range(len([*(partition / "holdout").iterdir()]))]
    found = [_labelled(folder, -(-config.images // len(folders)), config.seed) for folder in folders]
    samples = [sample for part in found for sample in part]
    if not samples:
        raise PipelineError("a classifier needs held-out images with a class, and none has one; raise data.holdout")
    clean = pipeline.codec.encode(np.stack([sample.image for sample in samples]))
    ensemble = pipeline.ensemble
    rows = config.draws * len(samples) * pipeline.num_classes
    voices = _counted(ensemble_and_experts(ensemble), lambda done: on_progress(done, rows))
    errors = denoising_errors(voices, clean, pipeline.num_classes, ensemble.path, config)
    known: Knowledge = knowledge(
        errors,
        torch.tensor([sample.label for sample in samples]),
        torch.tensor([k for k, part in enumerate(found) for _ in part]),
        [read_index(folder).count for folder in folders],
        sorted(ensemble.experts),
    )
    write_json(out / "classify.json", known)
    costs = RowFlops.of(pipeline)
    return rows * (sum(costs.experts.values()) + costs.router)


def _labelled(folder: Path, count: int, seed: int) -> list[Sample]:
    """At most `count` random images of a cluster, those without a class left out."""
    order = np.random.default_rng(seed).permutation(read_index(folder).count)[:count]
    return [sample for sample in read_rows(folder, np.sort(order)) if sample.label >= 0]


def _counted(voices: Voices, report: Callable[[int], None]) -> Voices:
    """The same voices; `report` hears how many rows they have seen."""
    seen = 0

    def counted(noised: Latents, t: Times, condition: Condition) -> Velocities:
        nonlocal seen
        seen += len(noised)
        report(seen)
        return voices(noised, t, condition)

    return counted
