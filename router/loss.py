"""What a router is trained on."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from experts.latents import Batch
from experts.noise_path import NoisePath


def router_loss(model: nn.Module, batch: Batch, path: NoisePath, num_classes: int) -> dict[str, Float[Tensor, ""]]:
    """Cross-entropy of the cluster given the noised sample, and the share of samples that are sent home.

    The samples come at the true proportions of the clusters: the probabilities are mixing coefficients, so
    the classes of this classifier are never balanced.
    """
    # Algorithm 1 of McAllister et al. 2025, arXiv:2501.05450: - E log p(k | x, t, c), x = alpha clean + sigma noise.
    noised = path.noised(batch.clean, batch.noise, batch.t)
    logits = model(noised, batch.t, batch.condition.table_index(num_classes)).float()
    is_home = logits.argmax(-1) == batch.cluster_id
    return {"loss": functional.cross_entropy(logits, batch.cluster_id), "accuracy": is_home.float().mean()}
