"""MMD fine-tuning: train a few-step sampler so that its samples are distributed as the cluster's latents.

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y),    x, x' samples, y, y' latents

Aiello et al. 2023, arXiv:2301.07969. Gradients flow back through every sampling step. Each step is recomputed in the
backward pass, so that memory does not grow with the number of steps.
"""

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
from experts.training.trainer import fit

Rows = Float[Tensor, "row feature"]
OtherRows = Float[Tensor, "other feature"]
Kernel = Callable[[Rows, OtherRows], Float[Tensor, "row other"]]
BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Squared bandwidths of the Gaussians, as multiples of the median squared distance."""
FINE = (1 / 64, 1 / 32, 1 / 16, 1 / 8)
"""Narrower bandwidths, which detect blurred or repeated samples; wide Gaussians do not."""


def median_kernel(kind: Literal["rbf", "poly3"], real: Rows, widths: Sequence[float] = BANDWIDTHS) -> Kernel:
    """Return the kernel; Gaussian bandwidths are multiples of the median squared distance of `real`."""
    if kind == "poly3":
        return lambda first, second: (first @ second.T / first.shape[1] + 1) ** 3
    distances = squared_distances(real.detach(), real.detach())
    median = distances[~torch.eye(len(real), dtype=torch.bool, device=real.device)].median()

    def gaussians(first: Rows, second: OtherRows) -> Float[Tensor, "row other"]:
        distances = squared_distances(first, second) / median.clamp(min=torch.finfo(real.dtype).tiny)
        return torch.stack([torch.exp(-distances / (2 * width)) for width in widths]).mean(0)

    return gaussians


def squared_distances(first: Rows, second: OtherRows) -> Float[Tensor, "row other"]:
    """Return the squared distances of all pairs; unlike those of distances, gradients are finite for equal rows."""
    squares = first.square().sum(1)[:, None] + second.square().sum(1)[None]
    return (squares - 2 * first @ second.T).clamp(min=0)


def squared_mmd(
    first: Rows,
    second: OtherRows,
    kernel: Kernel,
    conditions: tuple[Int[Tensor, " row"], Int[Tensor, " other"]] | None = None,
    across: float = 1.0,
) -> Float[Tensor, ""]:
    """Return the unbiased estimate of MMD^2, which can be negative.

    `conditions` are those of both sets, equal row by row. Pairs with different conditions have their kernel multiplied
    by `across`. Raises `StageError` if a set has fewer than two rows.
    """
    if min(len(first), len(second)) < 2:
        raise StageError("the unbiased MMD needs two rows in each set; raise distill.training.batch_size")

    def mean(pair: tuple[int, int]) -> Float[Tensor, ""]:
        sets = (first, second)
        values = kernel(sets[pair[0]], sets[pair[1]])
        if conditions is not None:
            is_equal = conditions[pair[0]][:, None] == conditions[pair[1]][None]
            values = values * (across + (1 - across) * is_equal)
        elif pair[0] != pair[1]:
            return values.mean()
        return (values.sum() - values.diagonal().sum()) / (len(values) * (len(values) - 1))

    return mean((0, 0)) + mean((1, 1)) - 2 * mean((0, 1))


MMDLossFn = Callable[[nn.Module, Batch], Tensor]
MEASURED = 8
"""Batches on which the sampler is measured before and after training."""


def finetune_mmd(expert: Expert, dataset: LatentDataset, config: MMDConfig, workspace: Workspace) -> ExpertResult:
    """Train a student of `config.steps` Euler steps.

    Raises `StageError` for batches or latents that are too few or do not fit, and what `fit` raises.
    """
    if min(config.training.batch_size, len(dataset)) < 2:
        raise StageError(
            "the unbiased MMD needs two rows in each set; raise distill.training.batch_size, or use larger clusters"
        )
    check_step_type(expert, "euler")
    if dataset.captions is not None and not (dataset.class_id >= 0).any():
        raise StageError(
            "distill=mmd compares samples of equal classes, and texts are hardly ever equal; choose distill=sid or "
            "distill=consistency"
        )
    loss = mmd_loss(expert, config)
    student = deepcopy(expert.model).requires_grad_(True)
    trained = fit(student, loss, dataset, config.training, workspace)
    on_cpu = mmd_loss(expert, replace(config, training=replace(config.training, device="cpu")))
    squared_mmds = [measure_mmd(model, on_cpu, dataset, config) for model in (expert.model, trained.model)]
    feature_passes = 3 if config.features == "expert" else 0
    training_passes = config.training.steps * (4 * config.steps + feature_passes)
    passes = config.training.batch_size * (training_passes + 2 * MEASURED * (config.steps + feature_passes))
    return ExpertResult(
        expert=replace(expert, model=trained.model, few_step=build_few_step_schedule(config), cache=None),
        modules=1,
        flops=passes * network_flops(expert.model, expert.latent_shape),
        details={
            "losses": trained.rows,
            "squared_mmd_before": squared_mmds[0],
            "squared_mmd_after": squared_mmds[1],
        },
    )


def mmd_loss(expert: Expert, config: MMDConfig) -> MMDLossFn:
    """Return the loss: the squared MMD between samples and the latents of a batch, under equal conditions."""
    features = latent_features(config.features, expert, config.seed, config.training.device)
    times = build_few_step_schedule(config).times

    def loss(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
        samples = sample_student(with_network(expert, model), batch.noise, batch.condition, times)
        real, generated = features(batch.clean), features(samples)
        conditions = (batch.condition.class_id, batch.condition.class_id)
        kernel = median_kernel(config.kernel, real)
        return squared_mmd(generated, real, kernel, conditions, config.across)

    return loss


def build_few_step_schedule(config: MMDConfig) -> FewStepSchedule:
    """Return the times at which the student is evaluated."""
    return FewStepSchedule.uniform(config.steps, "euler", is_distilled=True)


@torch.no_grad()
def measure_mmd(model: nn.Module, loss: MMDLossFn, dataset: LatentDataset, config: MMDConfig) -> float:
    """Return the mean loss over held-out batches, whose noise is not used in training."""
    batches = [make_batch(dataset, config.training, HELD_OUT + number) for number in range(MEASURED)]
    return sum(float(loss(model, batch)) for batch in batches) / MEASURED
