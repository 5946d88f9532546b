"""The table p(k | condition), whatever the noised sample: the least that a learned router must beat."""

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


def log_prior(counts: Counts) -> Counts:
    """log p(k | condition), the null condition in the last row; finite for every cluster that has a sample.

    What a class has never been seen in counts for p(k) / (n + 1), n its samples: the cross-entropy stays finite, and
    somebody speaks for the class if all experts that know it are missing. A class of no sample has the prior of all.
    """
    sizes, shares = counts.sum(1, keepdim=True), counts[-1:] / counts[-1:].sum()
    return torch.where(counts > 0, counts / sizes.clamp(min=1), shares / (sizes + 1)).log()


class PriorTableRouter(ModelMixin, ConfigMixin):
    """Looks the class up; has no parameters, and does not look at the noised sample."""

    log_prior: Tensor

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, num_experts: int, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("log_prior", log_prior(torch.ones(num_classes + 1, num_experts)))

    @classmethod
    def of(cls, counts: Counts) -> "PriorTableRouter":
        """The table of these counts."""
        table: PriorTableRouter = cls(counts.shape[1], counts.shape[0] - 1)
        table.log_prior = log_prior(counts).float()
        table.eval()
        return table

    def forward(self, noised: Latents, t: Times, class_index: ClassIndex) -> Logits:
        """log p(k | class)."""
        return self.log_prior[class_index]


def fit_table(_config: RouterConfig, _dataset: LatentDataset, counts: Counts, _workspace: Workspace) -> TrainingResult:
    """Trains nothing."""
    return TrainingResult(model=PriorTableRouter.of(counts), rows=[])
