"""Training of an expert on the last part of its trajectories alone, for truncated sampling.

    data:     E |prediction - target|^2 at noised samples with t uniform in [0, t_start]
    anchors:  E |clean estimate at alpha(t) anchor + sigma(t) noise - clean|^2, the anchor nearest to the sample

CAT-DM (Zeng et al. 2024, arXiv:2311.18405) trains below t_start. DiffusionDrive (Liao et al. 2024, arXiv:2411.15139)
also starts from noised anchors in training, so the network learns the step from an anchor to the samples around it. Its
head for the confidence in an anchor reads texts; where conditions are classes, the anchors' shares in each are exact.
"""

from copy import deepcopy
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ddm_core.artifacts import Workspace
from ensemble.compression.acceleration.config import TruncateConfig
from ensemble.compression.common.calibration_data import to_uniform_times
from ensemble.compression.method import StageError
from ensemble.multi_network_experts import TruncatedExpert
from experts.architectures.draft_generators import Anchors
from experts.diffusion.predictions import to_clean
from experts.expert import network_flops
from experts.networks.registry import call_network
from experts.training.flops import training_flops
from experts.training.latent_dataset import Batch, LatentDataset
from experts.training.loss import expert_loss
from experts.training.trainer import LossFn, fit


def train_refiner(
    expert: TruncatedExpert, dataset: LatentDataset, start: float, config: TruncateConfig, workspace: Workspace
) -> tuple[TruncatedExpert, float]:
    """Return a copy whose refiner is trained from `start` on, and the FLOPs.

    Raises `StageError` for `tune=anchors` and another draft, and what `fit` raises.
    """
    refiner, training = expert.refiner, config.tuning
    loss = _loss_below(expert, start, config)
    model = fit(deepcopy(refiner.model).requires_grad_(True), loss, dataset, training, workspace).model
    flops = training_flops(network_flops(refiner.model, refiner.latent_shape), training.batch_size, training.steps)
    return replace(expert, refiner=replace(refiner, model=model)), flops


def _loss_below(expert: TruncatedExpert, start: float, config: TruncateConfig) -> LossFn:
    refiner, draft = expert.refiner, expert.draft
    if config.tune == "anchors" and not isinstance(draft, Anchors):
        raise StageError(f"accelerate.tune=anchors needs accelerate.draft=anchors, not {config.draft}; set tune=data")

    def loss(model: nn.Module, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        batch = replace(batch, t=start * to_uniform_times(batch.t, config.tuning))
        if not isinstance(draft, Anchors) or config.tune == "data":
            return {"loss": expert_loss(model, batch, refiner.prediction, refiner.noise_schedule)}
        noised = refiner.noise_schedule.add_noise(nearest_anchors(draft, batch.clean), batch.noise, batch.t)
        predicted = call_network(model, noised, batch.t, batch.condition).float()
        estimate = to_clean(refiner.prediction, predicted, noised, batch.t, refiner.noise_schedule)
        return {"loss": functional.mse_loss(estimate, batch.clean)}

    return loss


def nearest_anchors(anchors: Anchors, clean: Tensor) -> Tensor:
    """Return the anchor nearest to each sample."""
    means = anchors.means.to(clean)
    return means[torch.cdist(clean.flatten(1), means.flatten(1)).argmin(1)]
