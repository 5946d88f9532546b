"""Diffusion Classifier: the class under which an image is denoised best (Li et al. 2023, arXiv:2303.16203).

    class of x = argmin_c  E_{t, noise} w(t) || v(x_t, t | c) - v* ||^2        v* = alpha' x + sigma' noise

Through the ensemble it tells what the whole knows, and through each expert alone what an expert knows of images that
it was not trained on. Classes are taken to be equally probable.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from data_partition.shards.shards import Sample, read_index
from ddm_core.artifacts import write_json
from ensemble.analysis.nearest_neighbors import read_rows
from ensemble.config import ClassifierConfig, Weighting
from ensemble.ensemble import Ensemble, ExpertOutput, combine_velocities
from ensemble.evaluation.generate import RowFlops
from ensemble.pipeline import DDMPipeline, PipelineError
from experts.condition import Condition
from experts.diffusion.noise_schedule import NoiseSchedule
from router.config import SelectionConfig

Latents = Float[Tensor, "batch *latent"]
Times = Float[Tensor, " batch"]
Velocities = Float[Tensor, "voice batch *latent"]
Models = Callable[[Latents, Times, Condition], Velocities]
"""(noised, t, condition) to the velocity of every voice: of the ensemble, of each expert alone."""
Errors = Float[Tensor, "voice image class"]


@torch.inference_mode()
def denoising_errors(
    voices: Models, clean: Latents, num_classes: int, path: NoiseSchedule, config: ClassifierConfig
) -> Errors:
    """Mean denoising error of every image under every class; all classes and voices see the same t and noise."""
    images = max(1, config.batch_size // num_classes)
    generator = torch.Generator().manual_seed(config.seed)
    total: Tensor = torch.zeros(())
    for draw in range(config.noises_per_image):
        t = ((draw + torch.rand(len(clean), generator=generator)) / config.noises_per_image).to(clean)
        noise = torch.randn(clean.shape, generator=generator, dtype=clean.dtype)
        starts = range(0, len(clean), images)
        rows = [slice(start, start + images) for start in starts]
        errors = [_errors(voices, clean[some], noise[some], t[some], num_classes, path) for some in rows]
        total = total + torch.cat(errors, dim=1) * WEIGHTINGS[config.weighting](t, path)[:, None]
    return total / config.noises_per_image


def _errors(
    voices: Models, clean: Latents, noise: Latents, t: Times, num_classes: int, path: NoiseSchedule
) -> Float[Tensor, "voice image class"]:
    """Squared distances from the true velocity, all classes in one batch."""
    condition = Condition(torch.arange(num_classes).repeat(len(clean)))
    noised, at = path.add_noise(clean, noise, t), t.repeat_interleave(num_classes)
    said = voices(noised.repeat_interleave(num_classes, 0), at, condition).double()
    target = path.velocity(clean, noise, t).repeat_interleave(num_classes, 0).double()
    return (said - target).square().flatten(2).mean(2).reshape(len(said), len(clean), num_classes)


def _even(t: Times, path: NoiseSchedule) -> Float[Tensor, " batch"]:
    """1: every t counts alike."""
    return torch.ones_like(t, dtype=torch.float64)


def _of_likelihood(t: Times, path: NoiseSchedule) -> Float[Tensor, " batch"]:
    """alpha / (sigma W), W = alpha sigma' - alpha' sigma: with it the error is - log p(x | c) up to a constant of x.

    It is the weight - SNR'(t) / 2 of Kingma et al. 2021, arXiv:2107.00630, equation (17), for a velocity.
    """
    t = t.double()
    alpha, sigma = path.alpha(t), path.sigma(t)
    return alpha / (sigma * (alpha * path.sigma_dot(t) - path.alpha_dot(t) * sigma))


WEIGHTINGS: dict[Weighting, Callable[[Times, NoiseSchedule], Float[Tensor, " batch"]]] = {
    "velocity": _even,
    "likelihood": _of_likelihood,
}


def ensemble_and_experts(ensemble: Ensemble) -> Models:
    """The whole ensemble by its posterior's gates, then each expert that is there; every expert is called once."""

    def voices(noised: Latents, t: Times, condition: Condition) -> Velocities:
        routing = ensemble.init_routing(range(len(noised)), condition, SelectionConfig(name="full"))
        gates, rows = ensemble.gates(noised, t, condition, routing), torch.arange(len(noised))
        alone = {
            k: ensemble.experts[k].velocity(noised, t, condition, ensemble.noise_schedule)
            for k in sorted(ensemble.experts)
        }
        spoken = [ExpertOutput(rows=rows, gates=gates[:, k], velocity=said) for k, said in alone.items()]
        return torch.stack([combine_velocities(noised, spoken), *alone.values()])

    return voices


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertAccuracy:
    """What the voices know of the images of every cluster."""

    models: tuple[str, ...]
    """`ensemble`, `expert_0` …"""
    accuracy: tuple[tuple[float | None, ...], ...]
    """Of every voice on the images of every cluster; None for a cluster without labelled images."""
    overall: tuple[float, ...]
    """Of every voice, each cluster counting by its size."""
    own_cluster: float | None
    """Mean accuracy of experts on the images of their own cluster."""
    other_clusters: float | None
    """Mean accuracy of experts on the images of the other clusters."""
    images: tuple[int, ...]
    """Images looked at, of every cluster."""
    floor: tuple[float | None, ...]
    """Accuracy in every cluster of always naming its commonest class: what the cluster alone gives away."""
    chance: float
    """One over the number of classes."""


def expert_accuracy(
    errors: Errors,
    labels: Int[Tensor, " image"],
    clusters: Int[Tensor, " image"],
    cluster_sizes: Sequence[int],
    expert_ids: Sequence[int],
) -> ExpertAccuracy:
    """Accuracies from errors whose first voice is the ensemble; clusters have `cluster_sizes` images in all."""
    is_right = errors.argmin(2) == labels
    here = [clusters == k for k in range(len(cluster_sizes))]
    accuracy = tuple(tuple(_share(right[own]) for own in here) for right in is_right)
    by_expert = dict(zip(expert_ids, accuracy[1:], strict=True))
    return ExpertAccuracy(
        models=("ensemble", *(f"expert_{k}" for k in expert_ids)),
        accuracy=accuracy,
        overall=tuple(_weighed(row, cluster_sizes) for row in accuracy),
        own_cluster=_mean([row[k] for k, row in by_expert.items()]),
        other_clusters=_mean(
            [value for k, row in by_expert.items() for cluster, value in enumerate(row) if cluster != k]
        ),
        images=tuple(int(own.sum()) for own in here),
        floor=tuple(_share(labels[own] == labels[own].mode().values) if own.any() else None for own in here),
        chance=1 / errors.shape[2],
    )


def _share(is_right: Tensor) -> float | None:
    return float(is_right.double().mean()) if len(is_right) else None


def _weighed(row: Sequence[float | None], sizes: Sequence[int]) -> float:
    known = [(value, size) for value, size in zip(row, sizes, strict=True) if value is not None]
    return sum(value * size for value, size in known) / max(1, sum(size for _, size in known))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


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
    rows = config.noises_per_image * len(samples) * pipeline.num_classes
    voices = _counted(ensemble_and_experts(ensemble), lambda done: on_progress(done, rows))
    errors = denoising_errors(voices, clean, pipeline.num_classes, ensemble.noise_schedule, config)
    known: ExpertAccuracy = expert_accuracy(
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


def _counted(voices: Models, report: Callable[[int], None]) -> Models:
    """The same voices; `report` hears how many rows they have seen."""
    seen = 0

    def counted(noised: Latents, t: Times, condition: Condition) -> Velocities:
        nonlocal seen
        seen += len(noised)
        report(seen)
        return voices(noised, t, condition)

    return counted
