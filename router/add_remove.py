"""Add an expert to a router or remove one, without retraining the other heads; only for kind `density_ratio`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ddm_core.artifacts import Workspace, write_json
from ddm_core.errors import DDMError
from experts.codecs.registry import load_codec
from experts.conditions.condition import Condition
from experts.conditions.null_text import get_null_text, set_null_text
from experts.conditions.text_encoder import TextEncoder
from experts.config import TrainingConfig
from experts.training.checkpoint import MetricsRow
from experts.training.flops import forward_flops, training_flops
from experts.training.held_out import check_classes
from experts.training.latent_dataset import LatentDataset
from experts.training.latents.training_set import encode_latents
from experts.training.trainer import write_rows
from router.calibration.text_prior import fit_text_prior
from router.models.density_ratio import DensityRatioRouter, divide_batch, make_seeded_head, train_head
from router.router import Router, count_priors


class RouterChangeError(DDMError, ValueError):
    """An expert cannot be added to a router or removed from it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtendedRouter:
    """A router with a new expert, and the metrics and FLOPs of its head's training."""

    router: Router
    rows: list[MetricsRow]
    flops: float


def add_head(
    router: Router, cluster: LatentDataset, reference: LatentDataset, training: TrainingConfig, workspace: Workspace
) -> ExtendedRouter:
    """Return the router with one more expert, of id K, whose data are `cluster`.

    `reference` must be the data of the router's first training: all clusters of that time, without later additions.
    Every head has its density in the denominator. Temperatures do not change; p(k | text) is fitted again, so a
    router with text takes one expert.
    """
    model = _check_density_ratio(router)
    _check_captions(router, cluster, reference)
    head, head_training = make_seeded_head(model, training.seed), divide_batch(training, router.num_experts)
    row, t, null = torch.zeros(1, *cluster.latent_shape), torch.full((1,), 0.5), Condition.null(1).embedding_index(0)
    flops = training_flops(forward_flops(lambda: head(row, t, null)), head_training.batch_size, head_training.steps)
    fitted = train_head(head, cluster, reference, head_training, router.noise_schedule, workspace)
    ids = torch.zeros(len(cluster), dtype=torch.int64)
    column = count_priors(ids, cluster.class_id, 1, router.num_classes).to(router.prior_counts)
    counts = torch.cat([router.prior_counts, column], dim=1)
    extended = _replace_heads(router, [*model.heads, fitted.model], counts)
    prior = fit_text_prior(reference, counts.shape[1], router.num_classes, cluster)
    return ExtendedRouter(router=replace(extended, text_prior=prior), rows=fitted.rows, flops=flops)


def remove_head(router: Router, expert_id: int) -> Router:
    """Return the router without one expert; higher ids decrease by one. Raises `RouterChangeError`."""
    model, remaining = _check_density_ratio(router), [k for k in range(router.num_experts) if k != expert_id]
    if len(remaining) == router.num_experts or not remaining:
        raise RouterChangeError(
            f"the expert to remove must be one of 0 ... {router.num_experts - 1}, and not the last one; got {expert_id}"
        )
    reduced = _replace_heads(router, [model.heads[k] for k in remaining], router.prior_counts[:, remaining])
    return replace(reduced, text_prior=router.text_prior and router.text_prior.without(expert_id))


def add_expert(
    folder: Path,
    shards: Path,
    reference: Sequence[Path],
    codec: Path,
    training: TrainingConfig,
    out: Path,
    workspace: Workspace,
    text: TextEncoder | None = None,
) -> float:
    """Write the router of `folder` to `out` with one more expert, for the samples of `shards`; return its FLOPs.

    `reference` are the clusters of the router's first training, `text` the encoder of their captions. Raises like
    `train_router`, and `RouterChangeError`.
    """
    router, loaded = Router.load(folder), load_codec(codec)
    _check_density_ratio(router)
    reference_workspace = replace(workspace, scratch=workspace.scratch / "reference")
    cluster = encode_latents([shards], loaded, codec, workspace, text)
    all_clusters = encode_latents(reference, loaded, codec, reference_workspace)
    check_classes(cluster, router.num_classes)
    extended = add_head(router, cluster, all_clusters, training, workspace)
    extended.router.save(out)
    write_rows(out / "metrics.jsonl", extended.rows)
    write_json(out / "training.json", {"flops": extended.flops, "steps": training.steps, "images": len(cluster)})
    return extended.flops


def remove_expert(folder: Path, expert_id: int, out: Path) -> None:
    """Write the router of `folder` to `out` without one expert; raises `RouterChangeError`."""
    remove_head(Router.load(folder), expert_id).save(out)


def _check_density_ratio(router: Router) -> DensityRatioRouter:
    if not isinstance(router.model, DensityRatioRouter):
        raise RouterChangeError(
            "only routers of kind density_ratio can add or remove experts, and this one is a "
            f"{type(router.model).__name__}: train the router again, with router=density_ratio to change it later"
        )
    model: DensityRatioRouter = router.model
    return model


def _check_captions(router: Router, cluster: LatentDataset, reference: LatentDataset) -> None:
    """Raise `RouterChangeError` if captions are missing of which p(k | text) is fitted, or those of a cluster."""
    if router.text_prior is None:
        return
    if cluster.captions is None or not len(cluster.captions.weight):
        raise RouterChangeError(
            "the router of this ensemble reads text, and none of the new samples has a caption; put one beside each "
            "image, and make the shards with data.captions=true"
        )
    if router.num_experts > (count := int(reference.cluster_id.max()) + 1):
        raise RouterChangeError(
            f"p(k | text) is fitted to all clusters together, and those of experts {count} … {router.num_experts - 1} "
            "are not part of the run; train the router again"
        )


def _replace_heads(router: Router, heads: Sequence[nn.Module], counts: Float[Tensor, "condition expert"]) -> Router:
    model: nn.Module = DensityRatioRouter.from_heads(heads, counts, _check_density_ratio(router))
    return replace(router, model=set_null_text(model, get_null_text(router.model)), prior_counts=counts)
