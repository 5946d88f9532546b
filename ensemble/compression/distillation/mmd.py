"""A short chain is fine-tuned as a whole: gradients of the MMD of its samples run back through every step.

Aiello et al. 2023, arXiv:2301.07969. Each step is computed again when its gradient is due, so that memory does not grow
with the chain.
"""

import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ddm_core.artifacts import Workspace
from ensemble.compression.common.calibration_data import HELD_OUT
from ensemble.compression.distillation.config import MMDConfig
from ensemble.compression.distillation.mmd_features import latent_features
from ensemble.compression.distillation.student import check_step_type, sample_student, with_network
from ensemble.compression.method import ExpertResult, StageError
from experts.diffusion.few_step import FewStepSchedule
from experts.expert import Expert, network_flops
from experts.training.latent_dataset import Batch, LatentDataset, make_batch
from experts.training.trainer import LossFn, fit

Rows = Float[Tensor, "row feature"]
OtherRows = Float[Tensor, "other feature"]
Kernel = Callable[[Rows, OtherRows], Float[Tensor, "row other"]]
BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Of the Gaussians, as multiples of the median squared distance."""
FINE = (1 / 64, 1 / 32, 1 / 16, 1 / 8)
"""The same for who has to see whether samples are blurred or alike, which wide Gaussians do not."""


def median_kernel(kind: Literal["rbf", "poly3"], real: Rows, widths: Sequence[float] = BANDWIDTHS) -> Kernel:
    """The kernel; the Gaussians' widths come from the real rows' median squared distance."""
    if kind == "poly3":
        return lambda first, second: (first @ second.T / first.shape[1] + 1) ** 3
    apart = squared_distances(real.detach(), real.detach())
    median = apart[~torch.eye(len(real), dtype=torch.bool, device=real.device)].median()

    def gaussians(first: Rows, second: OtherRows) -> Float[Tensor, "row other"]:
        apart = squared_distances(first, second) / median.clamp(min=torch.finfo(real.dtype).tiny)
        return torch.stack([torch.exp(-apart / (2 * width)) for width in widths]).mean(0)

    return gaussians


def squared_distances(first: Rows, second: OtherRows) -> Float[Tensor, "row other"]:
    """Of all pairs; its gradient is finite where two rows are equal, unlike that of the distance."""
    squares = first.square().sum(1)[:, None] + second.square().sum(1)[None]
    return (squares - 2 * first @ second.T).clamp(min=0)


def squared_mmd(
    first: Rows,
    second: OtherRows,
    kernel: Kernel,
    told: tuple[Int[Tensor, " row"], Int[Tensor, " other"]] | None = None,
    across: float = 1.0,
) -> Float[Tensor, ""]:
    """The estimate above; `told` are both sets' conditions, and pairs of unlike ones keep `across` of their kernel.

    With `told`, row i of both has the same. May be below zero. Raises `StageError` if a set has fewer than two
    rows.
    """
    if min(len(first), len(second)) < 2:
        raise StageError("the unbiased MMD needs two rows in each set; raise training.batch_size")

    def mean(pair: tuple[int, int]) -> Float[Tensor, ""]:
        sets = (first, second)
        values = kernel(sets[pair[0]], sets[pair[1]])
        if told is not None:
            values = values * (across + (1 - across) * (told[pair[0]][:, None] == told[pair[1]][None]))
        elif pair[0] != pair[1]:
            return values.mean()
        return (values.sum() - values.diagonal().sum()) / (len(values) * (len(values) - 1))

    return mean((0, 0)) + mean((1, 1)) - 2 * mean((0, 1))


MEASURED = 8
"""Batches on which the chain is measured before and after."""


def finetune_mmd(expert: Expert, dataset: LatentDataset, config: MMDConfig, workspace: Workspace) -> ExpertResult:
    """A student of `config.steps` Euler steps; raises `StageError` if batches or latents do not do, and as `fit`."""
    if min(config.training.batch_size, len(dataset)) < 2:
        raise StageError("the unbiased MMD needs two rows in each set; raise training.batch_size or give more samples")
    check_step_type(expert, "euler")
    started, course = time.monotonic(), few_step_schedule(config)
    loss = mmd_loss(expert, config)
    student = deepcopy(expert.model).requires_grad_(True)
    fitted = fit(student, loss, dataset, config.training, workspace)
    on_cpu = mmd_loss(expert, replace(config, training=replace(config.training, device="cpu")))
    found = [measure_mmd(model, on_cpu, dataset, config) for model in (expert.model, fitted.model)]
    seen = 3 if config.features == "expert" else 0
    learned = config.training.steps * (4 * config.steps + seen)
    rows = config.training.batch_size * (learned + 2 * MEASURED * (config.steps + seen))
    return ExpertResult(
        expert=replace(expert, model=fitted.model, few_step=course, cache=None),
        modules=1,
        flops=rows * network_flops(expert.model, expert.latent_shape),
        details={
            "losses": fitted.rows,
            "squared_mmd_before": found[0],
            "squared_mmd_after": found[1],
            "seconds": time.monotonic() - started,
        },
    )


def mmd_loss(expert: Expert, config: MMDConfig) -> LossFn:
    """The squared MMD of the chain's samples and the batch's, whose conditions they share."""
    features = latent_features(config.features, expert, config.seed, config.training.device)
    times = few_step_schedule(config).times

    def loss(model: nn.Module, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        drawn = sample_student(with_network(expert, model), batch.noise, batch.condition, times)
        real, made = features(batch.clean), features(drawn)
        told = (batch.condition.class_id, batch.condition.class_id)
        return {"loss": squared_mmd(made, real, median_kernel(config.kernel, real), told, config.across)}

    return loss


def few_step_schedule(config: MMDConfig) -> FewStepSchedule:
    """When the student is asked."""
    return FewStepSchedule.uniform(config.steps, "euler", is_distilled=True)


@torch.no_grad()
def measure_mmd(model: nn.Module, loss: LossFn, dataset: LatentDataset, config: MMDConfig) -> float:
    """Mean of the loss over batches whose noise trained nothing."""
    batches = [make_batch(dataset, config.training, HELD_OUT + number) for number in range(MEASURED)]
    return sum(float(loss(model, batch)["loss"]) for batch in batches) / MEASURED
