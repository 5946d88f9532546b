"""SpeedUpNet: guidance in one call, by branches that learn what the call with the negative condition adds.

    E |v(x_t, t, c; n, w) - (v(x_t, t, n) + w (v(x_t, t, c) - v(x_t, t, n)))|^2 / w

over guidance scales w and negative conditions n: null, and those of other samples. Only the branches are trained; the
expert itself stays as it is, and computes the target. Chai et al. 2023, arXiv:2312.08887. Branches fit every expert of
equal shapes, also one that was fine-tuned afterwards or has an adapter.

With `steps`, one step from t to the next t' is trained to end where several guided steps end (their multi-step
consistency, as we read it): the target is the mean (x_t' - x_t) / (t' - t) of the guided velocity along those steps.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ddm_core.artifacts import Workspace
from ddm_core.random_bits import Stream
from ensemble.compression.common.network_stages import describe_layers
from ensemble.compression.distillation.config import SpeedUpNetConfig
from ensemble.compression.distillation.student import check_can_distill, with_network
from ensemble.compression.method import ExpertResult, StageError
from experts.compressed.distillation.guidance_branch import extend_by_guidance, guidance_branches
from experts.conditions.null_text import get_null_text
from experts.diffusion.few_step import FewStepSchedule
from experts.diffusion.noise_schedule import expand
from experts.expert import Expert, network_flops
from experts.training.latent_dataset import Batch, LatentDataset, derive_seed
from experts.training.trainer import fit
from experts.types import Latents, Times


def train_speedup(
    expert: Expert, dataset: LatentDataset, config: SpeedUpNetConfig, workspace: Workspace
) -> ExpertResult:
    """Train branches of one expert.

    Raises `StageError` for an expert without conditions, that is a student, or whose network has no layer for a branch;
    and what `fit` raises.
    """
    check_can_distill(expert, dataset, config.max_guidance)
    null_text = get_null_text(expert.model)
    _, text_width, pooled_width = (0, 0, 0) if null_text is None else null_text.shape
    model = deepcopy(expert.model).requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        branches = extend_by_guidance(model, config.rank, expert.num_classes, text_width, pooled_width)
    if not branches:
        raise StageError(
            f"distill=speedup found no attention, features or blocks in this {type(model).__name__} that a "
            f"branch could extend; leave the stage out (its layers: {describe_layers(model)})"
        )
    for branch in guidance_branches(model).values():
        branch.requires_grad_(True)
    loss = partial(speedup_loss, expert=expert, config=config)
    trained = fit(model, loss, dataset, config.training, workspace)
    few_step = FewStepSchedule.uniform(config.steps, "euler") if config.steps else expert.few_step
    return ExpertResult(
        expert=replace(expert, model=trained.model.requires_grad_(True), few_step=few_step),
        modules=len(branches),
        flops=speedup_flops(network_flops(expert.model, expert.latent_shape), 0.0, config),
        details={"losses": trained.rows},
    )


def speedup_loss(network: nn.Module, batch: Batch, expert: Expert, config: SpeedUpNetConfig) -> dict[str, Tensor]:
    """Return the loss above, at random scales, with the conditions of other rows as half of the negative ones."""
    guided, count = with_network(expert, network), len(batch.t)
    generator = torch.Generator().manual_seed(derive_seed(Stream.SPEEDUP, config.training.seed, batch.step))
    scale = 1 + (config.max_guidance - 1) * torch.rand(count, generator=generator)
    is_null = torch.rand(count, generator=generator) < config.null_share
    scale, is_null = scale.to(batch.t), is_null.to(batch.t.device)
    negative = batch.condition.rows(torch.arange(count).roll(1).to(batch.t.device)).drop(is_null)
    t, end = batch.t, None
    if config.steps:
        index = torch.randint(config.steps, (count,), generator=generator).to(t)
        t, end = 1 - index / config.steps, 1 - (index + 1) / config.steps
    noised = expert.noise_schedule.add_noise(batch.clean, batch.noise, t)

    def guide(x: Latents, at: Times) -> Latents:
        away = guided.velocity(x, at, negative)
        return away + expand(scale, x) * (guided.velocity(x, at, batch.condition) - away)

    with torch.no_grad():
        target = guide(noised, t) if end is None else mean_velocity(guide, noised, t, end, config.substeps)
    predicted = guided.velocity(noised, t, batch.condition.guided(scale, negative))
    squared = (predicted - target).square().flatten(1).mean(1)
    return {"loss": (squared / scale).mean()}


def mean_velocity(
    velocity: Callable[[Latents, Times], Latents], noised: Latents, t: Times, end: Times, steps: int
) -> Latents:
    """Return (x_end - x_t) / (end - t) along `steps` equal steps of Euler's method, each row with its own t and end."""
    x, width = noised, (end - t) / steps
    for step in range(steps):
        x = x + expand(width, x) * velocity(x, t + step * width)
    return (x - noised) / expand(end - t, x)


def speedup_flops(student_flops: float, _teacher_flops: float, config: SpeedUpNetConfig) -> float:
    """Return the FLOPs of the training, from those of a row: the guided call with gradient, and two a target's step."""
    calls = 3 + 2 * (config.substeps if config.steps else 1)
    return calls * config.training.steps * config.training.batch_size * student_flops
