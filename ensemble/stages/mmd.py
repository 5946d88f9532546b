"""A short chain is fine-tuned as a whole: gradients of the MMD of its samples run back through every step.

Aiello et al. 2023, arXiv:2301.07969. Each step is computed again when its gradient is due, so that memory does not grow
with the chain.
"""

import time
from copy import deepcopy
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from artifacts import Workspace
from ensemble.stages.calibration import HELD_OUT
from ensemble.stages.chain import check_way, drawn_by, spoken_by
from ensemble.stages.method import Outcome, StageError
from ensemble.stages.mmd_config import MMDConfig
from ensemble.stages.mmd_features import latent_features
from ensemble.stages.mmd_kernel import kernel_of, squared_mmd
from experts.course import Course
from experts.expert import Expert, network_flops
from experts.latents import Batch, LatentDataset, batch_of
from experts.train import Loss, fit

MEASURED = 8
"""Batches on which the chain is measured before and after."""


def mmd(expert: Expert, dataset: LatentDataset, config: MMDConfig, workspace: Workspace) -> Outcome:
    """A student of `config.steps` Euler steps; raises `StageError` if batches or latents do not do, and as `fit`."""
    if min(config.training.batch_size, len(dataset)) < 2:
        raise StageError("the unbiased MMD needs two rows in each set; raise training.batch_size or give more samples")
    check_way(expert, "euler")
    started, course = time.monotonic(), course_of(config)
    loss = loss_of(expert, config)
    student = deepcopy(expert.model).requires_grad_(True)
    fitted = fit(student, loss, dataset, config.training, workspace)
    on_cpu = loss_of(expert, replace(config, training=replace(config.training, device="cpu")))
    found = [measured(model, on_cpu, dataset, config) for model in (expert.model, fitted.model)]
    seen = 3 if config.features == "expert" else 0
    learned = config.training.steps * (4 * config.steps + seen)
    rows = config.training.batch_size * (learned + 2 * MEASURED * (config.steps + seen))
    return Outcome(
        expert=replace(expert, model=fitted.model, course=course, cache=None),
        modules=1,
        flops=rows * network_flops(expert.model, expert.latent_shape),
        details={
            "losses": fitted.rows,
            "squared_mmd_before": found[0],
            "squared_mmd_after": found[1],
            "seconds": time.monotonic() - started,
        },
    )


def loss_of(expert: Expert, config: MMDConfig) -> Loss:
    """The squared MMD of the chain's samples and the batch's, whose conditions they share."""
    features = latent_features(config.features, expert, config.seed, config.training.device)
    times = course_of(config).times

    def loss(model: nn.Module, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        drawn = drawn_by(spoken_by(expert, model), batch.noise, batch.condition, times)
        real, made = features(batch.clean), features(drawn)
        told = (batch.condition.class_id, batch.condition.class_id)
        return {"loss": squared_mmd(made, real, kernel_of(config.kernel, real), told, config.across)}

    return loss


def course_of(config: MMDConfig) -> Course:
    """When the student is asked."""
    return Course.even(config.steps, "euler", is_distilled=True)


@torch.no_grad()
def measured(model: nn.Module, loss: Loss, dataset: LatentDataset, config: MMDConfig) -> float:
    """Mean of the loss over batches whose noise trained nothing."""
    batches = [batch_of(dataset, config.training, HELD_OUT + number) for number in range(MEASURED)]
    return sum(float(loss(model, batch)["loss"]) for batch in batches) / MEASURED
