"""SIGN, score-based idempotent distillation: a one-step student s that projects noise and corrupted latents onto data.

    score        gradient (g - f) / |x - f|_1 into x = s(noise)          distribution matching
    flow         E |s(noise) - y|^2,   y the expert's sample from the same noise
    idempotence  E |s(sg x) - sg x|^2                                   what it has made, it leaves as it is
    data         E |s(y_t) - y|^2,     y latents; t = 0 in half of the rows, and noised latents in the others

f and g are the clean estimates of the frozen expert and of a fake score that follows the student, at a noised x. The
student reads no t: noise, corrupted latents and its own samples all enter it at t = 1. Jindal et al. 2025,
arXiv:2509.21470; gradient of Yin et al. 2023, arXiv:2311.18828, equation 7.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional

from ddm_core.artifacts import Workspace
from ensemble.compression.common.alternating_trainer import Update, UpdateStep, train_alternating
from ensemble.compression.distillation.config import SignConfig
from ensemble.compression.distillation.sid import BETAS, MIN_DISTANCE, fake_score_loss
from ensemble.compression.distillation.student import (
    check_can_distill,
    guided_velocity,
    predict_clean,
    with_network,
)
from ensemble.compression.distillation.teacher import Teacher, copy_as_teacher
from ensemble.compression.method import ExpertResult
from ensemble.solvers import heun, uniform_times
from experts.conditions.condition import Condition
from experts.diffusion.few_step import FewStepSchedule
from experts.diffusion.noise_schedule import expand
from experts.expert import Expert, network_flops
from experts.training.latent_dataset import LatentDataset, make_batch
from experts.types import Latents, Times


def train_sign(expert: Expert, dataset: LatentDataset, config: SignConfig, workspace: Workspace) -> ExpertResult:
    """Train a student of one expert; raises what `train_sign_student` raises."""
    teacher, teacher_flops = copy_as_teacher(expert, config.training.device)
    return train_sign_student(expert, teacher, teacher_flops, dataset, config, workspace)


def train_sign_student(
    expert: Expert,
    teacher: Teacher,
    teacher_flops: float,
    dataset: LatentDataset,
    config: SignConfig,
    workspace: Workspace,
) -> ExpertResult:
    """Train a student from the expert's parameters; `teacher_flops` are those of the teacher on one row.

    Raises `StageError` for an expert that is a student already or guidance of one without conditions, and what
    `train_alternating` raises.
    """
    check_can_distill(expert, dataset, config.guidance)
    networks = {name: deepcopy(expert.model).requires_grad_(True) for name in ("student", "fake")}
    training = replace(config.training, betas=BETAS)
    trained = train_alternating(networks, make_update_step(expert, teacher, dataset, config), training, workspace)
    few_step = FewStepSchedule.uniform(1, "renoise", is_distilled=True)
    return ExpertResult(
        expert=replace(expert, model=trained.models["student"], few_step=few_step, cache=None),
        modules=1,
        flops=sign_flops(network_flops(expert.model, expert.latent_shape), teacher_flops, config),
        details={"losses": trained.rows},
    )


def make_update_step(expert: Expert, teacher: Teacher, dataset: LatentDataset, config: SignConfig) -> UpdateStep:
    """Return the training step: update the fake score, then the student, on samples of one batch of noise."""

    def update_step(networks: Mapping[str, nn.Module], step: int) -> Iterator[Update]:
        batch = make_batch(dataset, config.training, step).to(next(networks["student"].parameters()).device)
        student, fake = with_network(expert, networks["student"]), with_network(expert, networks["fake"])
        condition, t, count = batch.condition, batch.t, len(batch.t)
        sample = project(student, batch.noise, condition)
        # Rows in another order: their noise is independent of the samples, and the conditions stay where they are.
        fresh, t = batch.noise.roll(1, 0), t.roll(1, 0)
        yield "fake", {"loss": fake_score_loss(fake, sample.detach(), fresh, t, condition, 1.0)}
        level = torch.where(torch.arange(count, device=t.device) % 2 == 0, 0 * t, t)
        corrupted = expert.noise_schedule.add_noise(batch.clean, fresh, level)
        losses = {
            "score": score_loss(sample, fresh, t, condition, teacher, fake, config.guidance),
            "data": config.data_weight * functional.mse_loss(project(student, corrupted, condition), batch.clean),
        }
        if config.idempotence_weight:
            fixed = sample.detach()
            losses["idempotence"] = config.idempotence_weight * functional.mse_loss(
                project(student, fixed, condition), fixed
            )
        if config.flow_weight:
            target = sample_teacher(teacher, batch.noise, condition, config)
            losses["flow"] = config.flow_weight * functional.mse_loss(sample, target)
        yield "student", {"loss": torch.stack([*losses.values()]).sum()} | losses

    return update_step


def project(student: Expert, latents: Latents, condition: Condition) -> Latents:
    """Return what a student makes of noise, of corrupted latents or of clean ones, in one call."""
    return predict_clean(student, latents, latents.new_ones(len(latents)), condition)


@torch.no_grad()
def sample_teacher(teacher: Teacher, noise: Latents, condition: Condition, config: SignConfig) -> Latents:
    """Return the expert's samples from the noise, in few steps."""

    def velocity(noised: Latents, t: Times) -> Latents:
        return guided_velocity(teacher, noised, t, condition, config.guidance)

    return heun(velocity, noise, uniform_times(config.flow_steps))


def score_loss(
    sample: Latents,
    noise: Latents,
    t: Times,
    condition: Condition,
    teacher: Teacher,
    fake: Teacher,
    guidance: float,
) -> torch.Tensor:
    """Return a loss whose gradient to the sample is that of distribution matching, (g - f) / |x - f|_1 an element."""
    with torch.no_grad():
        noised = teacher.noise_schedule.add_noise(sample, noise, t)
        real = predict_clean(teacher, noised, t, condition, guidance)
        size = (sample - real).abs().flatten(1).mean(1).clamp(min=MIN_DISTANCE)
        target = sample - (predict_clean(fake, noised, t, condition) - real) / expand(size, sample)
    return functional.mse_loss(sample, target) / 2


def sign_flops(student_flops: float, teacher_flops: float, config: SignConfig) -> float:
    """Return the FLOPs of the training, from those of a row; a backward pass costs two forward passes."""
    rows, guided = config.training.steps * config.training.batch_size, 1 + (config.guidance != 1)
    student_calls = 3 * (3 + (config.idempotence_weight > 0)) + 1
    teacher_calls = 1 + (2 * config.flow_steps - 1) * (config.flow_weight > 0)
    return rows * (student_calls * student_flops + guided * teacher_calls * teacher_flops)
