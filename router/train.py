"""Train a router: the only trainer that uses all clusters, in parallel with the experts and without them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ddm_core.artifacts import Workspace, write_json
from experts.codecs.registry import load_codec
from experts.conditions.condition import Condition
from experts.conditions.null_text import set_null_text
from experts.conditions.text_embedding import TextEmbedding
from experts.diffusion.noise_schedule import NOISE_SCHEDULES, NoiseSchedule
from experts.expert_model import ExpertModel
from experts.training.flops import count_parameters, forward_flops
from experts.training.held_out import check_classes
from experts.training.latent_dataset import Batch, LatentDataset
from experts.training.latents.caption_costs import text_flops
from experts.training.latents.folder import read_class_names
from experts.training.latents.training_set import encode_latents
from experts.training.trainer import TrainingResult, fit, write_rows
from router.calibration.temperature import fit_temperatures
from router.calibration.text_prior import fit_text_prior
from router.config import RouterConfig, RouterKind
from router.costs import count_gradient_rows, is_calibrated, max_quality_images, text_prior_cost, training_cost
from router.expert_samples import ExpertSamples
from router.models.density import fit_density
from router.models.density_ratio import fit_density_ratio
from router.models.nearest_centroid import fit_nearest_centroid
from router.models.prior_table import fit_prior_table
from router.models.registry import build_router, call_router
from router.quality import Quality, calibration_split, measure_quality
from router.router import Router, count_priors


def router_loss(
    model: nn.Module, batch: Batch, noise_schedule: NoiseSchedule, num_classes: int
) -> dict[str, Float[Tensor, ""]]:
    """Compute the cross-entropy of the cluster given the noised sample, and the share of correct predictions.

    The samples have the true proportions of the clusters: the probabilities are mixing coefficients, so the classes of
    this classifier are never balanced.
    """
    # Algorithm 1 of McAllister et al. 2025, arXiv:2501.05450: - E log p(k | x, t, c), x = alpha clean + sigma noise.
    noised = noise_schedule.add_noise(batch.clean, batch.noise, batch.t)
    logits = call_router(model, noised, batch.t, batch.condition, num_classes).float()
    is_correct = logits.argmax(-1) == batch.cluster_id
    return {"loss": functional.cross_entropy(logits, batch.cluster_id), "accuracy": is_correct.float().mean()}


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSummary:
    """Costs and results of a training."""

    flops: float
    steps: int
    epochs: float
    """Average number of times that every sample was used."""
    images: int
    """Number of samples in all clusters."""
    parameters: int
    final_loss: float | None
    """Mean loss of the last metrics row; None for a router without training steps."""
    quality: Quality


def train_router(
    config: RouterConfig,
    clusters: Sequence[Path],
    codec: Path,
    holdouts: Sequence[Path],
    out: Path,
    workspace: Workspace,
    num_classes: int | None = None,
    expert_samples: Path | None = None,
    experts: Mapping[int, ExpertModel] | None = None,
) -> RouterSummary:
    """Train on the samples of all clusters; write the router's folder, its metrics and its quality to `out`.

    Cluster k is the k-th of `clusters` and of `holdouts`; `num_classes` None uses the number in the shards. With
    `expert_samples`, a folder of latents from the experts, `clusters` may be empty: only quality uses real samples.
    `experts` are those of the kind `density`, which alone needs them.
    """
    if expert_samples is None and len(clusters) != len(holdouts):
        raise ValueError(
            f"every cluster needs a folder of held-out samples; got {len(clusters)} clusters, "
            f"{len(holdouts)} holdouts: pass one per cluster"
        )
    loaded = load_codec(codec)
    samples = None if expert_samples is None else ExpertSamples.load(expert_samples)
    dataset = encode_latents(clusters, loaded, codec, workspace) if samples is None else samples.dataset
    holdout_workspace = replace(workspace, scratch=workspace.scratch / "holdout")
    holdout = encode_latents(holdouts, loaded, codec, holdout_workspace)
    if num_classes is None:
        num_classes = len(read_class_names(holdouts[0]))
    for latents in (dataset, holdout):
        check_classes(latents, num_classes)
    counts = count_priors(dataset.cluster_id, dataset.class_id, len(holdouts), num_classes)
    if samples is not None:
        config, counts = replace(config, data="samples"), samples.prior_counts
    extra_flops = text_flops([*clusters, *holdouts])
    return fit_router(config, dataset, holdout, out, workspace, counts, extra_flops, experts)


def fit_network(
    config: RouterConfig, dataset: LatentDataset, counts: Float[Tensor, "condition expert"], workspace: Workspace
) -> TrainingResult:
    """Train one network for all experts, by cross-entropy."""
    num_classes, noise_schedule = len(counts) - 1, NOISE_SCHEDULES[config.noise_schedule]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        model = build_router(config, dataset.latent_shape, counts.shape[1], num_classes, dataset.null_text)

    def loss(model: nn.Module, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        return router_loss(model, batch, noise_schedule, num_classes)

    return fit(model, loss, dataset, config.training, workspace)


FIT_FUNCTIONS: Final[dict[RouterKind, Callable[[RouterConfig, LatentDataset, Tensor, Workspace], TrainingResult]]] = {
    "mlp": fit_network,
    "transformer": fit_network,
    "prior_table": fit_prior_table,
    "nearest_centroid": fit_nearest_centroid,
    "density_ratio": fit_density_ratio,
    "density": fit_density,
}


def fit_router(
    config: RouterConfig,
    dataset: LatentDataset,
    holdout: LatentDataset,
    out: Path,
    workspace: Workspace,
    counts: Float[Tensor, "condition expert"],
    extra_flops: float = 0.0,
    experts: Mapping[int, ExpertModel] | None = None,
) -> RouterSummary:
    """Train on latents, `counts` laid out as `Router.prior_counts`; write the router's folder, metrics and quality.

    `extra_flops` are those of the preparation of the latents.
    """
    fitted = FIT_FUNCTIONS[config.kind](config, dataset, counts, workspace)
    router = Router(
        model=set_null_text(fitted.model, dataset.null_text),
        noise_schedule=NOISE_SCHEDULES[config.noise_schedule],
        prior_counts=counts,
        text_prior=fit_text_prior(dataset, counts.shape[1], len(counts) - 1),
        experts=experts,
    )
    quality_half, calibration_half = calibration_split(holdout)
    if is_calibrated(config) and len(calibration_half):
        temperatures = fit_temperatures(router.uncalibrated_logits, calibration_half, router.noise_schedule)
        router = replace(router, temperatures=temperatures)
    router.save(out)
    num_experts = counts.shape[1]
    prior_flops = _prior_flops(len(dataset), dataset.null_text, len(counts) - 1, num_experts)
    training = training_cost(config, _row_flops(router, dataset.latent_shape), num_experts)
    summary = RouterSummary(
        flops=training + prior_flops + extra_flops,
        steps=config.training.steps if fitted.rows else 0,
        epochs=count_gradient_rows(config, num_experts) / len(dataset),
        images=len(dataset),
        parameters=count_parameters(fitted.model),
        final_loss=fitted.rows[-1]["loss"] if fitted.rows else None,
        quality=measure_quality(router, quality_half, max_quality_images(config, num_experts)),
    )
    write_rows(out / "metrics.jsonl", fitted.rows)
    write_json(out / "training.json", summary)
    write_json(out / "quality.json", summary.quality)
    return summary


def router_flops(
    config: RouterConfig,
    latent_shape: tuple[int, ...],
    num_classes: int,
    num_experts: int,
    null_text: TextEmbedding | None = None,
    samples: int = 0,
) -> float:
    """Return the FLOPs of a complete training on so many samples with this configuration, without running it."""
    model = build_router(config, latent_shape, num_experts, num_classes, null_text)
    router = Router(
        model=model,
        noise_schedule=NOISE_SCHEDULES[config.noise_schedule],
        prior_counts=torch.ones(num_classes + 1, num_experts),
    )
    prior_flops = _prior_flops(samples, null_text, num_classes, num_experts)
    return training_cost(config, _row_flops(router, latent_shape), num_experts) + prior_flops


def _prior_flops(samples: int, null_text: TextEmbedding | None, num_classes: int, num_experts: int) -> float:
    return text_prior_cost(samples, 0 if null_text is None else null_text.shape[2], num_classes, num_experts)


def _row_flops(router: Router, latent_shape: Sequence[int]) -> float:
    row, t = torch.zeros(1, *latent_shape), torch.full((1,), 0.5)
    return forward_flops(lambda: router.logits(row, t, Condition.null(1)))
