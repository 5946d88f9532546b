"""Router kind `density_ratio`: one head per expert, trained separately, so experts can be added and removed.

p(k | x, t, c) ~ p(k | c) r_k(x, t),   r_k = p_k(x_t) / p_ref(x_t)

p_ref is the density of the data of the first training, all clusters together. It does not change when clusters are
added: it is the denominator of every head, so it cancels as long as all heads share it. With a condition this assumes
p(x | k, c) = p(x | k), that the cluster has all information of the class; without a condition it assumes nothing.
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
from router.models.prior_table import Counts, compute_log_prior


class DensityRatioRouter(ModelMixin, ConfigMixin):
    """A small network per expert for log r_k, and a table of the prior."""

    log_prior: Tensor

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, latent_shape: Sequence[int], num_experts: int, num_classes: int, width: int, depth: int) -> None:
        super().__init__()
        self.latent_shape, self.width, self.depth = list(latent_shape), width, depth
        self.heads = nn.ModuleList(make_head(latent_shape, width, depth) for _ in range(num_experts))
        self.register_buffer("log_prior", torch.zeros(num_classes + 1, num_experts))

    @classmethod
    def from_heads(cls, heads: Sequence[nn.Module], counts: Counts, like: "DensityRatioRouter") -> "DensityRatioRouter":
        """Create a router of these heads with the prior of these counts, otherwise with the sizes of `like`."""
        model: DensityRatioRouter = cls(like.latent_shape, len(heads), len(counts) - 1, like.width, like.depth)
        model.heads = nn.ModuleList(heads)
        model.log_prior = compute_log_prior(counts).float()
        model.eval()
        return model

    def forward(self, noised: Latents, t: Times, class_index: ClassIndex) -> Logits:
        """Return log r_k + log p(k | class)."""
        null_index = torch.zeros_like(class_index)
        ratios = torch.cat([head(noised, t, null_index) for head in self.heads], dim=1)
        return ratios + self.log_prior[class_index]


def make_head(latent_shape: Sequence[int], width: int, depth: int) -> MLPRouter:
    """Create an untrained head, which returns log r = 0."""
    head: MLPRouter = MLPRouter(list(latent_shape), num_experts=1, num_classes=0, width=width, depth=depth)
    return head


def ratio_loss(model: nn.Module, batch: Batch, noise_schedule: NoiseSchedule) -> dict[str, Float[Tensor, ""]]:
    """Compute the logistic loss between cluster (1 in `cluster_id`) and reference (0), which are equally frequent."""
    # Sugiyama, Suzuki & Kanamori 2012, doi:10.1017/CBO9781139035613, section 4: with equal numbers of both, the logit
    # of the best classifier is log p_k(x_t) / p_ref(x_t); any other proportion would add its logarithm.
    noised = noise_schedule.add_noise(batch.clean, batch.noise, batch.t)
    logit = model(noised, batch.t, torch.zeros_like(batch.cluster_id)).squeeze(-1).float()
    return {"loss": functional.binary_cross_entropy_with_logits(logit, batch.cluster_id.float())}


def balance(cluster: LatentDataset, reference: LatentDataset, limit: int) -> LatentDataset:
    """Combine equal numbers of both, at most about `limit` each, with `cluster_id` 1 and 0; repeat cluster samples."""
    selected = torch.arange(0, len(reference), max(1, len(reference) // limit))
    repeated = torch.arange(len(selected)) % len(cluster)
    if len(cluster) > len(selected):
        repeated = torch.arange(len(selected)) * len(cluster) // len(selected)
    rows = ((cluster, repeated), (reference, selected))
    return LatentDataset(
        clean=torch.cat([part.clean_rows(index) for part, index in rows]),
        class_id=torch.full((2 * len(selected),), -1),
        cluster_id=(torch.arange(2 * len(selected)) < len(selected)).long(),
    )


def train_head(
    head: MLPRouter,
    cluster: LatentDataset,
    reference: LatentDataset,
    training: TrainingConfig,
    noise_schedule: NoiseSchedule,
    workspace: Workspace,
) -> TrainingResult:
    """Train an untrained head on its cluster and the reference; the result is independent of other heads."""
    limit = -(-training.steps * training.batch_size // 2)

    def loss(model: nn.Module, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        return ratio_loss(model, batch, noise_schedule)

    return fit(head, loss, balance(cluster, reference, limit), training, workspace)


def divide_batch(training: TrainingConfig, num_experts: int) -> TrainingConfig:
    """Divide the batch size by K, to at least 2: all heads together cost as much as one network of their size."""
    return replace(training, batch_size=max(2, training.batch_size // num_experts))


def fit_density_ratio(
    config: RouterConfig, dataset: LatentDataset, counts: Counts, workspace: Workspace
) -> TrainingResult:
    """Train all heads in sequence against the complete data set; metrics rows are means over the heads."""
    training = divide_batch(config.training, counts.shape[1])
    noise_schedule, results = NOISE_SCHEDULES[config.noise_schedule], []
    like = DensityRatioRouter(list(dataset.latent_shape), 0, len(counts) - 1, config.width, config.depth)
    for k in range(counts.shape[1]):
        head = make_seeded_head(like, training.seed)
        head_workspace = replace(workspace, scratch=workspace.scratch / f"head_{k}")
        results.append(train_head(head, select_cluster(dataset, k), dataset, training, noise_schedule, head_workspace))
    model = DensityRatioRouter.from_heads([result.model for result in results], counts, like)
    rows = [_mean_row(rows) for rows in zip(*(result.rows for result in results), strict=True)]
    return TrainingResult(model=model, rows=rows)


def make_seeded_head(like: DensityRatioRouter, seed: int) -> MLPRouter:
    """Create an untrained head of the same size as those of `like`, from the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make_head(like.latent_shape, like.width, like.depth)


def select_cluster(dataset: LatentDataset, k: int) -> LatentDataset:
    """Return the samples of one cluster; raises `ValueError` if it has none."""
    rows = (dataset.cluster_id == k).nonzero().squeeze(-1)
    if not len(rows):
        raise ValueError(f"a head needs samples of its cluster; cluster {k} has none: remove it")
    return dataset.select(rows)


def _mean_row(rows: Sequence[MetricsRow]) -> MetricsRow:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
