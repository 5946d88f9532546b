"""Score samples of a pipeline against held-out images: one row of a table.

    reference folder ─────────────┐
    pipeline ──► images ──► features, classes, clusters, neighbours ──► scores.json

All outputs depend on the inputs alone: a second evaluation writes the same bytes.
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8

from ddm_core.artifacts import Workspace, write_json
from ensemble.config import EvaluationConfig, SamplingConfig, count_repeats
from ensemble.evaluation.generate import generate
from ensemble.evaluation.held_out_prompts import load_held_out_conditions
from ensemble.evaluation.reference import PROBE
from ensemble.evaluation.scores import Scores
from ensemble.evaluation.scoring import Reference, compare_clusters
from ensemble.evaluation.spaces import PIXELS, RANKED_SPACE
from ensemble.evaluation.text_scores import compare_prompts
from ensemble.pipeline import EnsemblePipeline
from ensemble.sampling.images import encode_png, image_grid
from ensemble.sampling.trajectories import write_trajectories
from experts.conditions.condition import Condition
from experts.training.held_out import HELD_OUT, TIMES, measure_held_out, take_evenly
from experts.training.latents.folder import keeps_texts, read_latents, with_images
from experts.types import Latents, RowTimes
from router.config import SelectionConfig, selection_label

HELD_OUT_CALLS = 4096
"""Calls of experts, about, for the held-out loss of an ensemble of as many experts as there are clusters."""

GRID_IMAGES = 64
"""Samples in `grid.png`, eight per row."""


def evaluate(
    pipeline_folder: Path,
    reference: Path,
    partition: Path,
    config: EvaluationConfig,
    sampling: SamplingConfig,
    out: Path,
    workspace: Workspace,
) -> Scores:
    """Generate `config.num_samples` images, or as many as there are training images, and score them.

    Writes `scores.json`, `images.npy`, `seeds.npy`, `grid.png` and `trajectories.safetensors` into `out`. Raises
    `EvaluationError` if the reference was built for another configuration, `ValueError` if the samples are too few for
    a metric.
    """
    loaded = Reference.load(reference, config)
    config = loaded.config
    seeds = range(config.seed * config.num_samples, (config.seed + 1) * config.num_samples)
    asked = load_held_out_conditions(reference, config.num_samples, pipeline_folder) if config.conditional else None
    prompts = asked and asked.by_text()
    generated = generate(pipeline_folder, seeds, prompts, sampling, workspace)
    _write_images(out, generated.images, seeds)
    again = seeds[: count_repeats(config.num_samples)]
    write_trajectories(pipeline_folder, again, prompts and prompts.rows(slice(len(again))), sampling, out)
    features = loaded.extract(generated.images)
    classes = loaded.compare_classes(features.spaces[PROBE])
    clusters = compare_clusters(partition, generated.images)
    scores = Scores(
        num_samples=config.num_samples,
        held_out=loaded.statistics["summary"]["held_out"],
        selection=selection_label(sampling.selection),
        spaces={name: loaded.compare_space(name, features.spaces[name]) for name in config.spaces},
        class_coverage=classes.coverage if classes else None,
        class_tv=classes.tv if classes else None,
        class_tv_floor=classes.tv_floor if classes else None,
        probe_accuracy=classes.probe_accuracy if classes else None,
        cluster_share_tv=clusters.tv,
        cluster_share_tv_floor=clusters.tv_floor,
        cluster_shares=clusters.shares,
        cluster_shares_data=clusters.data_shares,
        copies=loaded.find_copies(features.spaces[PIXELS]),
        calls_per_step=generated.calls.per_evaluation,
        flops_per_image=generated.flops / config.num_samples,
        flops=generated.flops * (1 + len(again) / config.num_samples) + features.flops,
        text=compare_prompts(reference, pipeline_folder, asked, features.spaces, config)
        if asked is not None and RANKED_SPACE in features.spaces
        else None,
        held_out_loss=measure_ensemble(pipeline_folder, partition, sampling),
    )
    write_json(out / "scores.json", scores)
    return scores


def measure_ensemble(pipeline_folder: Path, partition: Path, sampling: SamplingConfig) -> float | None:
    """Return the held-out loss of a pipeline with all its experts, on the same samples for every pipeline of a run.

    None if the partition has no held-out latents, or keeps their captions as text, and for experts that cannot be
    evaluated at any t.
    """
    folders = sorted((partition / "holdout_latents").glob("*"), key=lambda path: int(path.name))
    pipeline = EnsemblePipeline.from_pretrained(pipeline_folder)
    opened = [with_images(read_latents(path), [path], pipeline.codec) for path in folders if not keeps_texts(path)]
    found, ensemble = [latents for latents in opened if len(latents)], pipeline.ensemble.to(sampling.device)
    experts = ensemble.experts.values()
    if not found or not all(expert.takes_any_t for expert in experts):
        return None

    def velocity(noised: Latents, t: RowTimes, condition: Condition) -> Latents:
        routing = ensemble.init_routing(range(len(t)), condition, SelectionConfig(name="full"))
        return ensemble.velocity(noised, t, condition, routing)

    count, device = max(len(found), HELD_OUT_CALLS // (len(TIMES) * len(folders))), torch.device(sampling.device)
    losses, counts = [], []
    for latents in found:
        samples = take_evenly(latents, max(1, count * len(latents) // sum(map(len, found))))
        measured = measure_held_out(velocity, samples, ensemble.noise_schedule, sampling.batch_size, device)
        losses.append(measured[HELD_OUT] * len(samples))
        counts.append(len(samples))
    return sum(losses) / sum(counts)


def _write_images(out: Path, images: UInt8[np.ndarray, "batch height width channel"], seeds: range) -> None:
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "images.npy", images, allow_pickle=False)
    np.save(out / "seeds.npy", np.array(seeds, np.int64), allow_pickle=False)
    first = torch.from_numpy(images[:GRID_IMAGES]).float() / 255
    (out / "grid.png").write_bytes(encode_png(image_grid(first, columns=8)))
