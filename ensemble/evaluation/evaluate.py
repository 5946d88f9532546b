"""Samples of a pipeline, scored against held-out images: one row of a table.

    reference folder ─────────────┐
    pipeline ──► images ──► features, classes, clusters, neighbours ──► scores.json

Everything that is written depends on the inputs alone: a second evaluation writes the same bytes.
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8

from ddm_core.artifacts import Workspace, write_json
from ensemble.config import EvaluationConfig, SamplingConfig
from ensemble.evaluation.generate import generate
from ensemble.evaluation.reference import PIXELS, EvaluationError
from ensemble.evaluation.scores import Scores
from ensemble.evaluation.scoring import Reference, score_clusters
from ensemble.sampling.images import grid, png
from router.config import selection_label

GRID_IMAGES = 64
"""Samples shown in `grid.png`, eight a row."""


def evaluate(
    pipeline_folder: Path,
    reference: Path,
    partition: Path,
    config: EvaluationConfig,
    sampling: SamplingConfig,
    out: Path,
    workspace: Workspace,
) -> Scores:
    """Draw `config.num_samples` images, or as many as there are training images, and score them.

    Writes `out/scores.json`, `out/images.npy`, `out/seeds.npy` and `out/grid.png`. Raises `EvaluationError` if
    the reference was made for another configuration, `ValueError` if the samples are too few for a metric.
    """
    real = Reference.load(reference, config)
    config = real.config
    seeds = range(config.seed * config.num_samples, (config.seed + 1) * config.num_samples)
    class_ids = held_out_classes(reference, config.num_samples) if config.conditional else None
    drawn = generate(pipeline_folder, seeds, class_ids, sampling, workspace)
    found = real.extract(drawn.images)
    classes = real.score_classes(found.spaces[PIXELS])
    clusters = score_clusters(partition, drawn.images)
    scores = Scores(
        num_samples=config.num_samples,
        selection=selection_label(sampling.selection),
        spaces={name: real.score_space(name, found.spaces[name]) for name in config.spaces},
        class_coverage=classes.coverage if classes else None,
        class_tv=classes.tv if classes else None,
        class_tv_floor=classes.tv_floor if classes else None,
        probe_accuracy=classes.probe_accuracy if classes else None,
        cluster_share_tv=clusters.tv,
        cluster_share_tv_floor=clusters.tv_floor,
        cluster_shares=clusters.shares,
        cluster_shares_data=clusters.data_shares,
        nn_ratio=real.nearest_ratio(found.spaces[PIXELS]),
        calls_per_step=drawn.calls.per_evaluation,
        flops_per_image=drawn.flops / config.num_samples,
        flops=drawn.flops + found.flops,
    )
    _write_images(out, drawn.images, seeds)
    write_json(out / "scores.json", scores)
    return scores


def held_out_classes(reference: Path, count: int) -> list[int]:
    """`count` classes with the held-out images' shares: theirs in random order, from the start again if need be."""
    labels = np.load(reference / "labels.npy", allow_pickle=False)
    labels = labels[labels >= 0]
    if not len(labels):
        raise EvaluationError(
            "conditional samples need classes, and no held-out image has one; set `conditional` to false"
        )
    chosen: list[int] = np.resize(labels, count).tolist()
    return chosen


def _write_images(out: Path, images: UInt8[np.ndarray, "batch height width channel"], seeds: range) -> None:
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "images.npy", images, allow_pickle=False)
    np.save(out / "seeds.npy", np.array(seeds, np.int64), allow_pickle=False)
    shown = torch.from_numpy(images[:GRID_IMAGES]).float() / 255
    (out / "grid.png").write_bytes(png(grid(shown, columns=8)))
