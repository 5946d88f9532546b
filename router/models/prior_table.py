"""Router kind `prior_table`: p(k | condition), independent of the noised sample; the baseline of all others."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float
from torch import Tensor

from ddm_core.artifacts import Workspace
from experts.training.latent_dataset import LatentDataset
from experts.training.trainer import TrainingResult
from router.config import RouterConfig
from router.models.mlp import ClassIndex, Latents, Logits, Times

Counts = Float[Tensor, "condition expert"]


def compute_log_prior(counts: Counts) -> Counts:
    """Compute log p(k | condition), with the null condition in the last row; finite for every non-empty cluster.

    A cluster without samples of a class gets p(k) / (n + 1), where n is the number of samples of the class. So the
    cross-entropy stays finite, and the class has an expert even if all experts with samples of it are missing. A class
    without samples gets the prior of all samples.
    """
    sizes, shares = counts.sum(1, keepdim=True), counts[-1:] / counts[-1:].sum()
    return torch.where(counts > 0, counts / sizes.clamp(min=1), shares / (sizes + 1)).log()


class PriorTableRouter(ModelMixin, ConfigMixin):
    """Table of the prior by class; it has no parameters and ignores the noised sample."""

    log_prior: Tensor

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, num_experts: int, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("log_prior", compute_log_prior(torch.ones(num_classes + 1, num_experts)))

    @classmethod
    def from_counts(cls, counts: Counts) -> "PriorTableRouter":
        """Create the table of these counts."""
        table: PriorTableRouter = cls(counts.shape[1], counts.shape[0] - 1)
        table.log_prior = compute_log_prior(counts).float()
        table.eval()
        return table

    def forward(self, noised: Latents, t: Times, class_index: ClassIndex) -> Logits:
        """Return log p(k | class)."""
        return self.log_prior[class_index]


def fit_prior_table(
    _config: RouterConfig, _dataset: LatentDataset, counts: Counts, _workspace: Workspace
) -> TrainingResult:
    """Create the table; there is no training."""
    return TrainingResult(model=PriorTableRouter.from_counts(counts), rows=[])
