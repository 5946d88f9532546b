"""Train a router: the only trainer that sees every cluster, beside the experts and without them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from artifacts import Workspace, write_json
from data_partition.shards import read_index
from experts.codecs import load_codec
from experts.condition import Condition
from experts.expert import check_classes
from experts.flops import forward_flops, training_flops
from experts.latents import Batch, LatentDataset, encode_latents
from experts.noise_path import PATHS
from experts.train import fit, write_rows
from router.config import RouterConfig
from router.loss import router_loss
from router.model import build_router
from router.quality import Quality, measure_quality
from router.router import Router, count_priors


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSummary:
    """What a training amounted to."""

    flops: float
    steps: int
    epochs: float
    """How often every sample was seen."""
    images: int
    """Samples in all clusters."""
    parameters: int
    final_loss: float
    """Mean cross-entropy of the last metrics row."""
    quality: Quality


def train_router(
    config: RouterConfig,
    clusters: Sequence[Path],
    codec: Path,
    holdouts: Sequence[Path],
    out: Path,
    workspace: Workspace,
    num_classes: int | None = None,
) -> RouterSummary:
    """Train on the samples of all clusters and write the router's folder, its metrics and its quality to `out`.

    Cluster k is the k-th of `clusters` and of `holdouts`; `num_classes` None takes the shards' own.
    """
    if len(clusters) != len(holdouts):
        raise ValueError(
            f"every cluster needs its held-out samples; got {len(clusters)} clusters, {len(holdouts)} holdouts"
        )
    loaded = load_codec(codec)
    dataset = encode_latents(clusters, loaded, codec, workspace)
    aside = replace(workspace, scratch=workspace.scratch / "holdout")
    holdout = encode_latents(holdouts, loaded, codec, aside)
    if num_classes is None:
        num_classes = len(read_index(clusters[0]).class_names)
    for latents in (dataset, holdout):
        check_classes(latents, num_classes)
    return _fit_router(config, dataset, holdout, out, workspace, len(clusters), num_classes)


def _fit_router(
    config: RouterConfig,
    dataset: LatentDataset,
    holdout: LatentDataset,
    out: Path,
    workspace: Workspace,
    num_experts: int,
    num_classes: int,
) -> RouterSummary:
    path, training = PATHS[config.path], config.training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        model = build_router(config, dataset.latent_shape, num_experts, num_classes)

    def loss(model: nn.Module, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        return router_loss(model, batch, path, num_classes)

    fitted = fit(model, loss, dataset, training, workspace)
    counts = count_priors(dataset.cluster_id, dataset.class_id, num_experts, num_classes)
    router = Router(model=fitted.model, path=path, prior_counts=counts)
    router.save(out)
    summary = RouterSummary(
        flops=training_flops(_row_flops(router, dataset.latent_shape), training.batch_size, training.steps),
        steps=training.steps,
        epochs=training.steps * training.batch_size / len(dataset),
        images=len(dataset),
        parameters=sum(parameter.numel() for parameter in fitted.model.parameters()),
        final_loss=fitted.rows[-1]["loss"],
        quality=measure_quality(router, holdout),
    )
    write_rows(out / "metrics.jsonl", fitted.rows)
    write_json(out / "training.json", summary)
    write_json(out / "quality.json", summary.quality)
    return summary


def router_flops(config: RouterConfig, latent_shape: tuple[int, ...], num_classes: int, num_experts: int) -> float:
    """FLOPs of a whole training by this recipe, without doing it."""
    model = build_router(config, latent_shape, num_experts, num_classes)
    router = Router(model=model, path=PATHS[config.path], prior_counts=torch.ones(num_classes + 1, num_experts))
    return training_flops(_row_flops(router, latent_shape), config.training.batch_size, config.training.steps)


def _row_flops(router: Router, latent_shape: Sequence[int]) -> float:
    row, t = torch.zeros(1, *latent_shape), torch.full((1,), 0.5)
    return forward_flops(lambda: router.logits(row, t, Condition.null(1)))
