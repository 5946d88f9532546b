"""A router with one expert more or fewer, and no other head trained again: of all kinds, `density_ratio` alone can."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ddm_core.artifacts import Workspace, write_json
from experts.codecs.registry import load_codec
from experts.condition import Condition
from experts.config import TrainingConfig
from experts.expert import check_classes
from experts.training.checkpoint import MetricsRow
from experts.training.flops import forward_flops, training_flops
from experts.training.latent_dataset import LatentDataset, encode_latents
from experts.training.trainer import write_rows
from router.models.density_ratio import DensityRatioRouter, seeded_head, share_of_batch, train_head
from router.router import Router, count_priors


class RouterChangeError(ValueError):
    """An expert cannot be added to a router, or taken from it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtendedRouter:
    """A router with a new expert, and what its head took."""

    router: Router
    rows: list[MetricsRow]
    flops: float


def add_head(
    router: Router, cluster: LatentDataset, reference: LatentDataset, training: TrainingConfig, workspace: Workspace
) -> ExtendedRouter:
    """The same router with one expert more, of id K, whose data are `cluster`.

    `reference` must be the data that the router was first trained on, all clusters of that time together, without what
    was added since: every head has its density in the denominator. Temperatures stay as they are.
    """
    ratios = _ratios(router)
    head, shared = seeded_head(ratios, training.seed), share_of_batch(training, router.num_experts)
    row, t, null = torch.zeros(1, *cluster.latent_shape), torch.full((1,), 0.5), Condition.null(1).embedding_index(0)
    flops = training_flops(forward_flops(lambda: head(row, t, null)), shared.batch_size, shared.steps)
    fitted = train_head(head, cluster, reference, shared, router.noise_schedule, workspace)
    ids = torch.zeros(len(cluster), dtype=torch.int64)
    column = count_priors(ids, cluster.class_id, 1, router.num_classes).to(router.prior_counts)
    counts = torch.cat([router.prior_counts, column], dim=1)
    return ExtendedRouter(router=_of(router, [*ratios.heads, fitted.model], counts), rows=fitted.rows, flops=flops)


def remove_head(router: Router, expert_id: int) -> Router:
    """The same router without one expert; the ids above it move down by one."""
    ratios, left = _ratios(router), [k for k in range(router.num_experts) if k != expert_id]
    if len(left) == router.num_experts or not left:
        raise RouterChangeError(
            f"an expert to remove must be one of 0 ... {router.num_experts - 1}, and not the last one; got {expert_id}"
        )
    return _of(router, [ratios.heads[k] for k in left], router.prior_counts[:, left])


def add_expert(
    folder: Path,
    shards: Path,
    reference: Sequence[Path],
    codec: Path,
    training: TrainingConfig,
    out: Path,
    workspace: Workspace,
) -> float:
    """Write the router of `folder` to `out` with one expert more, for the samples of `shards`; returns its FLOPs.

    `reference` are the clusters that the router was first trained on. Raises what `train_router` and `with_head` do.
    """
    router, loaded = Router.load(folder), load_codec(codec)
    _ratios(router)
    aside = replace(workspace, scratch=workspace.scratch / "reference")
    cluster, whole = encode_latents([shards], loaded, codec, workspace), encode_latents(reference, loaded, codec, aside)
    check_classes(cluster, router.num_classes)
    grown = add_head(router, cluster, whole, training, workspace)
    grown.router.save(out)
    write_rows(out / "metrics.jsonl", grown.rows)
    write_json(out / "training.json", {"flops": grown.flops, "steps": training.steps, "images": len(cluster)})
    return grown.flops


def remove_expert(folder: Path, expert_id: int, out: Path) -> None:
    """Write the router of `folder` to `out` without one expert; raises `RouterChangeError`."""
    remove_head(Router.load(folder), expert_id).save(out)


def _ratios(router: Router) -> DensityRatioRouter:
    if not isinstance(router.model, DensityRatioRouter):
        raise RouterChangeError(
            "experts are added to and removed from routers of kind density_ratio alone, and this one is a "
            f"{type(router.model).__name__}: train the router again, with router=density_ratio to change it later"
        )
    ratios: DensityRatioRouter = router.model
    return ratios


def _of(router: Router, heads: Sequence[nn.Module], counts: Float[Tensor, "condition expert"]) -> Router:
    model: nn.Module = DensityRatioRouter.of(heads, counts, _ratios(router))
    return replace(router, model=model, prior_counts=counts)
