"""Score identity distillation (SiD): train a few-step student from an expert alone, without data.

    student:     E w(t) (f - g) . [(f - x) - alpha (f - g)] / |x - f|_1,   x = student(noise)
    fake score:  E |g's prediction - target(x, noise, t)|^2

f and g are the clean estimates of the frozen expert and of the fake score at a noised x; gradients flow through both
into x. Zhou et al. 2024, arXiv:2404.04057, equation 23; guidance of both, 2406.01561; several steps, 2505.12674.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ddm_core.artifacts import Workspace
from ddm_core.random_bits import Stream
from ensemble.compression.common.alternating_trainer import Update, UpdateStep, frozen_parameters, train_alternating
from ensemble.compression.distillation.config import SiDConfig
from ensemble.compression.distillation.student import (
    check_step_type,
    predict_clean,
    rollout_to,
    sample_conditions,
    with_network,
)
from ensemble.compression.distillation.teacher import Teacher, copy_as_teacher
from ensemble.compression.method import ExpertResult, StageError
from experts.conditions.condition import Condition
from experts.diffusion.few_step import FewStepSchedule
from experts.diffusion.noise_schedule import expand
from experts.diffusion.predictions import training_target
from experts.expert import Expert, network_flops
from experts.networks.registry import call_network
from experts.training.latent_dataset import LatentDataset, derive_seed
from experts.types import Latents, Times

BETAS = (0.0, 0.999)
"""Betas of both optimizers, as in all three papers."""
MIN_DISTANCE = 1e-5
"""Lower bound of the distance by which the student's loss is divided."""


def distill_sid(
    expert: Expert, dataset: LatentDataset, config: SiDConfig, workspace: Workspace, start: nn.Module | None = None
) -> ExpertResult:
    """Train a student of one expert, from its parameters or from `start`; raises what `distill_sid_student` raises."""
    teacher, teacher_flops = copy_as_teacher(expert, config.training.device)
    initial = expert if start is None else replace(expert, model=start)
    return distill_sid_student(initial, expert.model, teacher, teacher_flops, dataset, config, workspace)


def distill_sid_student(
    expert: Expert,
    fake: nn.Module,
    teacher: Teacher,
    teacher_flops: float,
    dataset: LatentDataset,
    config: SiDConfig,
    workspace: Workspace,
) -> ExpertResult:
    """Train a student of `config.steps` steps; only the classes of the data are used.

    The student starts from the expert's parameters, the fake score from those of `fake`; `teacher_flops` are those of
    the teacher on one row. Raises `StageError` if guidance or step type does not fit the expert, and what
    `train_alternating` raises.
    """
    check_step_type(expert, config.step_type)
    _check_guidance(expert, dataset, config)
    initial = {"student": expert.model, "fake": fake}
    networks = {name: deepcopy(model).requires_grad_(True) for name, model in initial.items()}
    training = replace(config.training, betas=BETAS)
    trained = train_alternating(networks, make_update_step(expert, teacher, dataset, config), training, workspace)
    return ExpertResult(
        expert=replace(expert, model=trained.models["student"], few_step=build_few_step_schedule(config), cache=None),
        modules=1,
        flops=sid_flops(network_flops(expert.model, expert.latent_shape), teacher_flops, config),
        details={"losses": trained.rows},
    )


def make_update_step(expert: Expert, teacher: Teacher, dataset: LatentDataset, config: SiDConfig) -> UpdateStep:
    """Return the training step: update the fake score, then the student, on samples at one of the student's times."""
    few_step, rows = build_few_step_schedule(config), config.training.batch_size

    def update_step(networks: Mapping[str, nn.Module], step: int) -> Iterator[Update]:
        generator = torch.Generator().manual_seed(derive_seed(Stream.SCORE_IDENTITY, config.training.seed, step))
        device = next(networks["student"].parameters()).device
        student, fake = with_network(expert, networks["student"]), with_network(expert, networks["fake"])
        condition = sample_conditions(dataset, rows, config.training.condition_dropout, generator).to(device)
        # Uniform mixture (2505.12674, section 3.2): one of the student's times, the same for both updates.
        last = int(torch.randint(config.steps, (), generator=generator))
        noise = torch.randn(last + 1, rows, *expert.latent_shape, generator=generator).to(device)
        with torch.no_grad():
            noised = rollout_to(student, list(noise), condition, few_step, last)
        clean = predict_clean(student, noised, noised.new_full((rows,), few_step.times[last]), condition)
        for _ in range(config.fake_score_updates):
            t, fresh = _sample_t_and_noise(config, expert, generator, device)
            scale = config.fake_training_guidance
            yield "fake", {"loss": fake_score_loss(fake, clean.detach(), fresh, t, condition, scale)}
        t, fresh = _sample_t_and_noise(config, expert, generator, device)
        with frozen_parameters(networks["fake"]):
            loss = student_loss(clean, fresh, t, condition, teacher, fake, config)
        yield "student", {"loss": loss}

    return update_step


def build_few_step_schedule(config: SiDConfig) -> FewStepSchedule:
    """Return the times at which the student is evaluated."""
    return FewStepSchedule.uniform(config.steps, config.step_type, start=config.start, is_distilled=True)


def student_loss(
    clean: Latents, noise: Latents, t: Times, condition: Condition, teacher: Teacher, fake: Expert, config: SiDConfig
) -> Float[Tensor, ""]:
    """Return the student's loss above, the mean over elements; differentiable with respect to `clean`."""
    noised = teacher.noise_schedule.add_noise(clean, noise, t)
    real = predict_clean(teacher, noised, t, condition, config.teacher_guidance)
    fake_clean = predict_clean(fake, noised, t, condition, config.fake_guidance)
    difference = real - fake_clean
    size = (clean - real).abs().flatten(1).mean(1).detach().clamp(min=MIN_DISTANCE)
    weight = teacher.noise_schedule.alpha(t) / size if config.weighting == "signal" else 1 / size
    return (expand(weight, clean) * difference * ((real - clean) - config.alpha * difference)).mean()


def fake_score_loss(
    fake: Expert, clean: Latents, noise: Latents, t: Times, condition: Condition, guidance: float
) -> Float[Tensor, ""]:
    """Return the training loss of an expert, on samples of the student instead of data."""
    noised = fake.noise_schedule.add_noise(clean, noise, t)
    prediction = call_network(fake.model, noised, t, condition).float()
    if guidance != 1:
        null = call_network(fake.model, noised, t, Condition.null(len(condition), noised.device)).float()
        prediction = null + guidance * (prediction - null)
    return functional.mse_loss(prediction, training_target(fake.prediction, clean, noise, t, fake.noise_schedule))


def sid_flops(student_flops: float, teacher_flops: float, config: SiDConfig) -> float:
    """Return the FLOPs of the training, from those of a row.

    A backward pass costs two forward passes, and one to the inputs alone costs one.
    """
    passes = [2 if scale not in {0, 1} else 1 for scale in (config.fake_guidance, config.teacher_guidance)]
    training_passes = 2 if config.fake_training_guidance != 1 else 1
    calls = (config.steps - 1) / 2 + 3 + 3 * training_passes * config.fake_score_updates + 2 * passes[0]
    rows = config.training.steps * config.training.batch_size
    return rows * (calls * student_flops + 2 * passes[1] * teacher_flops)


def _sample_t_and_noise(
    config: SiDConfig, expert: Expert, generator: torch.Generator, device: torch.device
) -> tuple[Times, Latents]:
    """Sample a logit-normal t and noise for every row."""
    rows = config.training.batch_size
    t = torch.randn(rows, generator=generator).mul(config.training.t_std).add(config.training.t_mean).sigmoid()
    noise = torch.randn(rows, *expert.latent_shape, generator=generator)
    return t.to(device), noise.to(device)


def _check_guidance(expert: Expert, dataset: LatentDataset, config: SiDConfig) -> None:
    """Raise `StageError` for guidance of an expert without classes."""
    scales = (config.teacher_guidance, config.fake_guidance, config.fake_training_guidance)
    if any(scale != 1 for scale in scales) and not (expert.is_conditional and dataset.has_conditions):
        raise StageError(
            f"guidance {scales} needs an expert that was trained with classes or text, and expert {expert.cluster_id} "
            "has none; set all three scales to 1"
        )
