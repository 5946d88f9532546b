"""One head per expert, trained without the others: an expert comes or goes, and no other head changes.

p(k | x, t, c) ~ p(k | c) r_k(x, t),   r_k = p_k(x_t) / p_ref(x_t)

p_ref is the density of the data that the router was first trained on, all clusters together, and stays that one when
clusters are added: it is in every head's denominator, so it cancels, as long as it is the same for all. That clusters
tell all that the class tells, p(x | k, c) = p(x | k), is assumed with a condition; without one nothing is.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ddm_core.artifacts import Workspace
from experts.config import TrainingConfig
from experts.diffusion.noise_schedule import NOISE_SCHEDULES, NoiseSchedule
from experts.training.checkpoint import MetricsRow
from experts.training.latent_dataset import Batch, LatentDataset
from experts.training.trainer import TrainingResult, fit
from router.config import RouterConfig
from router.models.mlp import ClassIndex, Latents, Logits, MLPRouter, Times
from router.models.prior_table import Counts, log_prior


class DensityRatioRouter(ModelMixin, ConfigMixin):
    """A small network per expert, which gives log r_k, and the table of the prior."""

    log_prior: Tensor

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, latent_shape: Sequence[int], num_experts: int, num_classes: int, width: int, depth: int) -> None:
        super().__init__()
        self.latent_shape, self.width, self.depth = list(latent_shape), width, depth
        self.heads = nn.ModuleList(new_head(latent_shape, width, depth) for _ in range(num_experts))
        self.register_buffer("log_prior", torch.zeros(num_classes + 1, num_experts))

    @classmethod
    def of(cls, heads: Sequence[nn.Module], counts: Counts, like: "DensityRatioRouter") -> "DensityRatioRouter":
        """These heads with the prior of these counts."""
        model: DensityRatioRouter = cls(like.latent_shape, len(heads), len(counts) - 1, like.width, like.depth)
        model.heads = nn.ModuleList(heads)
        model.log_prior = log_prior(counts).float()
        model.eval()
        return model

    def forward(self, noised: Latents, t: Times, class_index: ClassIndex) -> Logits:
        """log r_k + log p(k | class)."""
        untold = torch.zeros_like(class_index)
        ratios = torch.cat([head(noised, t, untold) for head in self.heads], dim=1)
        return ratios + self.log_prior[class_index]


def new_head(latent_shape: Sequence[int], width: int, depth: int) -> MLPRouter:
    """An untrained head, which says that nothing is known: log r = 0."""
    head: MLPRouter = MLPRouter(list(latent_shape), num_experts=1, num_classes=0, width=width, depth=depth)
    return head


def ratio_loss(model: nn.Module, batch: Batch, path: NoiseSchedule) -> dict[str, Float[Tensor, ""]]:
    """Logistic regression between the cluster (1 in `cluster_id`) and the reference (0), which come equally often."""
    # Sugiyama, Suzuki & Kanamori 2012, doi:10.1017/CBO9781139035613, section 4: with as many of both, the logit of the
    # best classifier is log p_k(x_t) / p_ref(x_t); any other proportion would add its logarithm.
    noised = path.add_noise(batch.clean, batch.noise, batch.t)
    logit = model(noised, batch.t, torch.zeros_like(batch.cluster_id)).squeeze(-1).float()
    return {"loss": functional.binary_cross_entropy_with_logits(logit, batch.cluster_id.float())}


def balanced(cluster: LatentDataset, reference: LatentDataset, most: int) -> LatentDataset:
    """Both as often, the cluster's samples repeated, with `cluster_id` 1 and 0; at most about `most` of each."""
    chosen = torch.arange(0, len(reference), max(1, len(reference) // most))
    repeated = torch.arange(len(chosen)) % len(cluster)
    if len(cluster) > len(chosen):
        repeated = torch.arange(len(chosen)) * len(cluster) // len(chosen)
    rows = ((cluster, repeated), (reference, chosen))
    return LatentDataset(
        clean=torch.cat([part.clean.index_select(0, index) for part, index in rows]),
        class_id=torch.full((2 * len(chosen),), -1),
        cluster_id=(torch.arange(2 * len(chosen)) < len(chosen)).long(),
    )


def train_head(
    head: MLPRouter,
    cluster: LatentDataset,
    reference: LatentDataset,
    training: TrainingConfig,
    path: NoiseSchedule,
    workspace: Workspace,
) -> TrainingResult:
    """Train an untrained head on its cluster and the reference: what it learns depends on no other cluster's name."""
    most = -(-training.steps * training.batch_size // 2)

    def loss(model: nn.Module, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        return ratio_loss(model, batch, path)

    return fit(head, loss, balanced(cluster, reference, most), training, workspace)


def share_of_batch(training: TrainingConfig, num_experts: int) -> TrainingConfig:
    """A head's K-th of the batch, at least 2: all heads together cost what one network of their size does."""
    return replace(training, batch_size=max(2, training.batch_size // num_experts))


def fit_ratios(config: RouterConfig, dataset: LatentDataset, counts: Counts, workspace: Workspace) -> TrainingResult:
    """All heads, one after the other; the reference is the whole data set. Rows hold means over the heads."""
    training, path, fitted = (
        share_of_batch(config.training, counts.shape[1]),
        NOISE_SCHEDULES[config.noise_schedule],
        [],
    )
    like = DensityRatioRouter(list(dataset.latent_shape), 0, len(counts) - 1, config.width, config.depth)
    for k in range(counts.shape[1]):
        head = seeded_head(like, training.seed)
        aside = replace(workspace, scratch=workspace.scratch / f"head_{k}")
        fitted.append(train_head(head, of_cluster(dataset, k), dataset, training, path, aside))
    model = DensityRatioRouter.of([found.model for found in fitted], counts, like)
    rows = [_mean_row(rows) for rows in zip(*(found.rows for found in fitted), strict=True)]
    return TrainingResult(model=model, rows=rows)


def seeded_head(like: DensityRatioRouter, seed: int) -> MLPRouter:
    """An untrained head of the same size as `like` has, a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return new_head(like.latent_shape, like.width, like.depth)


def of_cluster(dataset: LatentDataset, k: int) -> LatentDataset:
    """The samples of one cluster; raises `ValueError` if it has none."""
    rows = (dataset.cluster_id == k).nonzero().squeeze(-1)
    if not len(rows):
        raise ValueError(f"a head needs samples of its cluster; cluster {k} has none: leave it out")
    return LatentDataset(
        clean=dataset.clean.index_select(0, rows), class_id=dataset.class_id[rows], cluster_id=dataset.cluster_id[rows]
    )


def _mean_row(rows: Sequence[MetricsRow]) -> MetricsRow:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
