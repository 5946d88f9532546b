"""Diffusion Classifier: assign the class under which an image is denoised best (Li et al. 2023, arXiv:2303.16203).

    class of x = argmin_c  E_{t, noise} w(t) || v(x_t, t | c) - v* ||^2        v* = alpha' x + sigma' noise

All classes of an image see the same t and noise (section 4 of the paper: the difference of two errors then varies
little), so a class that is clearly worse after a few pairs need not be evaluated on the others.

The ensemble's accuracy measures what all experts represent together, the accuracy of a single expert what it represents
of images that it was not trained on. The prior over classes is uniform.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from data_partition.shards.shards import Sample, read_index
from ddm_core.artifacts import write_json
from ensemble.config import ClassifierConfig, Weighting
from ensemble.ensemble import Ensemble, ExpertOutput, combine_velocities
from ensemble.evaluation.generate import RowFlops
from ensemble.evaluation.nearest_neighbors import read_rows
from ensemble.pipeline import EnsemblePipeline
from ensemble.pipeline_folder import PipelineError
from experts.conditions.condition import Condition
from experts.diffusion.noise_schedule import NoiseSchedule
from router.config import SelectionConfig

Latents = Float[Tensor, "batch *latent"]
Times = Float[Tensor, " batch"]
Velocities = Float[Tensor, "model batch *latent"]
VelocityModels = Callable[[Latents, Times, Condition], Velocities]
"""(noised, t, condition) to the velocities of the ensemble and of each expert."""
Errors = Float[Tensor, "model image class"]


@torch.inference_mode()
def denoising_errors(
    models: VelocityModels, clean: Latents, num_classes: int, noise_schedule: NoiseSchedule, config: ClassifierConfig
) -> Errors:
    """Compute the mean denoising error of every image under every class; t and noise are the same for all of them."""
    images = max(1, config.batch_size // num_classes)
    generator = torch.Generator().manual_seed(config.seed)
    total: Tensor = torch.zeros(())
    for index in range(config.noises_per_image):
        t = ((index + torch.rand(len(clean), generator=generator)) / config.noises_per_image).to(clean)
        noise = torch.randn(clean.shape, generator=generator, dtype=clean.dtype)
        starts = range(0, len(clean), images)
        rows = [slice(start, start + images) for start in starts]
        errors = [_errors(models, clean[part], noise[part], t[part], num_classes, noise_schedule) for part in rows]
        total = total + torch.cat(errors, dim=1) * WEIGHTINGS[config.weighting](t, noise_schedule)[:, None]
    return total / config.noises_per_image


MIN_PAIRS = 4
"""Pairs of t and noise on which every class is evaluated, before one may be eliminated."""


@torch.inference_mode()
def eliminate_classes(
    models: VelocityModels, clean: Latents, num_classes: int, noise_schedule: NoiseSchedule, config: ClassifierConfig
) -> tuple[Errors, int]:
    """Compute denoising errors, infinite for classes that are eliminated early, and the number of evaluated rows.

    A class of an image is eliminated when for every model its error exceeds that of the model's best class by
    `config.elimination` standard errors of their paired difference.
    """
    generator, count = torch.Generator().manual_seed(config.seed), config.noises_per_image
    # The order of the strata of t is random: the first few pairs cover all of [0, 1].
    strata, limit = torch.randperm(count, generator=generator), config.elimination or torch.inf
    is_active = torch.ones(len(clean), num_classes, dtype=torch.bool)
    history, evaluated = [], 0
    for number, stratum in enumerate(strata.tolist(), start=1):
        t = ((stratum + torch.rand(len(clean), generator=generator)) / count).to(clean)
        noise = torch.randn(clean.shape, generator=generator, dtype=clean.dtype)
        images, classes = (is_active & (is_active.sum(1, keepdim=True) > 1)).nonzero(as_tuple=True)
        if not len(images):
            break
        noised, target = noise_schedule.add_noise(clean, noise, t), noise_schedule.velocity(clean, noise, t)
        parts = []
        for rows, class_id in zip(*(torch.split(part, config.batch_size) for part in (images, classes)), strict=True):
            velocity = models(noised[rows], t[rows], Condition(class_id))
            parts.append((velocity - target[rows]).double().square().flatten(2).mean(2))
        errors = torch.full((len(parts[0]), len(clean), num_classes), torch.inf, dtype=torch.float64)
        errors[:, images, classes] = torch.cat(parts, 1)
        weights = WEIGHTINGS[config.weighting](t, noise_schedule)
        history.append(errors * weights[:, None])
        evaluated += len(images)
        if number >= MIN_PAIRS:
            is_active &= ~_is_clearly_worse(torch.stack(history), is_active, limit)
    means = torch.stack(history).where(torch.stack(history).isfinite(), torch.nan).nanmean(0)
    return means.masked_fill(~is_active, torch.inf), evaluated


def _is_clearly_worse(
    history: Float[Tensor, "pair model image class"], is_active: Bool[Tensor, "image class"], limit: float
) -> Bool[Tensor, "image class"]:
    """Return the classes whose paired difference to the best active one is significant for every model."""
    means = history.mean(0).masked_fill(~is_active, torch.inf)
    best = means.argmin(2, keepdim=True)
    differences = history - history.gather(3, best.expand(len(history), *best.shape))
    error = differences.std(0) / len(history) ** 0.5
    is_worse: Tensor = ((differences.mean(0) > limit * error) & is_active).all(0)
    return is_worse


def _errors(
    models: VelocityModels, clean: Latents, noise: Latents, t: Times, num_classes: int, noise_schedule: NoiseSchedule
) -> Float[Tensor, "model image class"]:
    """Return squared distances from the true velocity, with all classes in one batch."""
    condition = Condition(torch.arange(num_classes).repeat(len(clean)))
    noised, times = noise_schedule.add_noise(clean, noise, t), t.repeat_interleave(num_classes)
    velocity = models(noised.repeat_interleave(num_classes, 0), times, condition).double()
    target = noise_schedule.velocity(clean, noise, t).repeat_interleave(num_classes, 0).double()
    return (velocity - target).square().flatten(2).mean(2).reshape(len(velocity), len(clean), num_classes)


def _uniform_weight(t: Times, noise_schedule: NoiseSchedule) -> Float[Tensor, " batch"]:
    """Return 1 for every t."""
    return torch.ones_like(t, dtype=torch.float64)


def _likelihood_weight(t: Times, noise_schedule: NoiseSchedule) -> Float[Tensor, " batch"]:
    """Return alpha / (sigma W), W = alpha sigma' - alpha' sigma: the error is - log p(x | c) up to a constant of x.

    This is the weight - SNR'(t) / 2 of Kingma et al. 2021, arXiv:2107.00630, equation (17), for a velocity.
    """
    t = t.double()
    alpha, sigma = noise_schedule.alpha(t), noise_schedule.sigma(t)
    return alpha / (sigma * (alpha * noise_schedule.sigma_dot(t) - noise_schedule.alpha_dot(t) * sigma))


WEIGHTINGS: dict[Weighting, Callable[[Times, NoiseSchedule], Float[Tensor, " batch"]]] = {
    "velocity": _uniform_weight,
    "likelihood": _likelihood_weight,
}


def create_models(ensemble: Ensemble) -> VelocityModels:
    """Return the velocities of the ensemble with `full` gates and of each expert; an expert is called once."""

    def models(noised: Latents, t: Times, condition: Condition) -> Velocities:
        routing = ensemble.init_routing(range(len(noised)), condition, SelectionConfig(name="full"))
        gates, rows = ensemble.gates(noised, t, condition, routing), torch.arange(len(noised))
        velocities = {
            k: ensemble.experts[k].velocity(noised, t, condition, ensemble.noise_schedule)
            for k in sorted(ensemble.experts)
        }
        outputs = [ExpertOutput(rows=rows, gates=gates[:, k], velocity=velocity) for k, velocity in velocities.items()]
        return torch.stack([combine_velocities(noised, outputs), *velocities.values()])

    return models


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertAccuracy:
    """Accuracy of the ensemble and of each expert on the images of every cluster."""

    models: tuple[str, ...]
    """`ensemble`, `expert_0` …"""
    accuracy: tuple[tuple[float | None, ...], ...]
    """Of every model on the images of every cluster; None for a cluster without labeled images."""
    overall: tuple[float, ...]
    """Of every model, with clusters weighted by their size."""
    own_cluster: float | None
    """Mean accuracy of experts on the images of their own cluster."""
    other_clusters: float | None
    """Mean accuracy of experts on the images of the other clusters."""
    images: tuple[int, ...]
    """Classified images of every cluster."""
    floor: tuple[float | None, ...]
    """Accuracy in every cluster of its most common class, which follows from the cluster alone."""
    chance: float
    """One over the number of classes."""


def expert_accuracy(
    errors: Errors,
    labels: Int[Tensor, " image"],
    clusters: Int[Tensor, " image"],
    cluster_sizes: Sequence[int],
    expert_ids: Sequence[int],
) -> ExpertAccuracy:
    """Compute accuracies from errors whose first model is the ensemble; `cluster_sizes` counts all images."""
    is_right = errors.argmin(2) == labels
    in_cluster = [clusters == k for k in range(len(cluster_sizes))]
    accuracy = tuple(tuple(_share(row[mask]) for mask in in_cluster) for row in is_right)
    by_expert = dict(zip(expert_ids, accuracy[1:], strict=True))
    return ExpertAccuracy(
        models=("ensemble", *(f"expert_{k}" for k in expert_ids)),
        accuracy=accuracy,
        overall=tuple(_weighted_mean(row, cluster_sizes) for row in accuracy),
        own_cluster=_mean([row[k] for k, row in by_expert.items()]),
        other_clusters=_mean(
            [value for k, row in by_expert.items() for cluster, value in enumerate(row) if cluster != k]
        ),
        images=tuple(int(mask.sum()) for mask in in_cluster),
        floor=tuple(_share(labels[mask] == labels[mask].mode().values) if mask.any() else None for mask in in_cluster),
        chance=1 / errors.shape[2],
    )


def _share(is_right: Tensor) -> float | None:
    return float(is_right.double().mean()) if len(is_right) else None


def _weighted_mean(row: Sequence[float | None], sizes: Sequence[int]) -> float:
    pairs = [(value, size) for value, size in zip(row, sizes, strict=True) if value is not None]
    return sum(value * size for value, size in pairs) / max(1, sum(size for _, size in pairs))


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def classify(
    pipeline: EnsemblePipeline,
    partition: Path,
    config: ClassifierConfig,
    out: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """Write `out/classify.json` and return the FLOPs; raise `PipelineError` without classes or labeled images."""
    if not pipeline.num_classes:
        raise PipelineError(
            "a classifier needs experts that were trained with classes, and these have 0; "
            "use a data set with classes, and data.labels=true"
        )
    if pipeline.text is not None:
        raise PipelineError(
            "a classifier compares classes without a text, and these experts were trained on both together; use a run "
            "with text=none"
        )
    folders = [partition / "holdout" / str(k) for k in range(len([*(partition / "holdout").iterdir()]))]
    by_cluster = [_read_labeled(folder, -(-config.images // len(folders)), config.seed) for folder in folders]
    samples = [sample for part in by_cluster for sample in part]
    if not samples:
        raise PipelineError("a classifier needs held-out images with a class, and none has one; raise data.holdout")
    clean = pipeline.codec.encode(np.stack([sample.image for sample in samples]))
    ensemble = pipeline.ensemble
    rows = config.noises_per_image * len(samples) * pipeline.num_classes
    models = _count_rows(create_models(ensemble), lambda done: on_progress(done, rows))
    inputs = models, clean, pipeline.num_classes, ensemble.noise_schedule, config
    if config.elimination is None:
        errors = denoising_errors(*inputs)
    else:
        errors, rows = eliminate_classes(*inputs)
    accuracy: ExpertAccuracy = expert_accuracy(
        errors,
        torch.tensor([sample.label for sample in samples]),
        torch.tensor([k for k, part in enumerate(by_cluster) for _ in part]),
        [read_index(folder).count for folder in folders],
        sorted(ensemble.experts),
    )
    write_json(out / "classify.json", accuracy)
    costs = RowFlops.measure(pipeline)
    return rows * (sum(costs.experts.values()) + costs.router)


def _read_labeled(folder: Path, count: int, seed: int) -> list[Sample]:
    """Read `count` random images of a cluster, and drop those without a class."""
    order = np.random.default_rng(seed).permutation(read_index(folder).count)[:count]
    return [sample for sample in read_rows(folder, np.sort(order)) if sample.label >= 0]


def _count_rows(models: VelocityModels, report: Callable[[int], None]) -> VelocityModels:
    """Return the same models; `report` receives the number of evaluated rows."""
    rows = 0

    def counted(noised: Latents, t: Times, condition: Condition) -> Velocities:
        nonlocal rows
        rows += len(noised)
        report(rows)
        return models(noised, t, condition)

    return counted
