"""Score identity distillation: a student in few steps from an expert, without data.

    student:     E w(t) (f - g) . [(f - x) - alpha (f - g)] / |x - f|_1,   x = student(noise)
    fake score:  E |g's prediction - target(x, noise, t)|^2

f and g are the clean estimates of the frozen expert and of the fake score at a noised x; gradients run through both
into x. Zhou et al. 2024, arXiv:2404.04057, equation 23; guidance of both, 2406.01561; several steps, 2505.12674.
"""

import time
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ddm_core.artifacts import Workspace
from ensemble.compression.common.alternating_trainer import Update, UpdateStep, frozen_parameters, train_alternating
from ensemble.compression.distillation.config import SiDConfig
from ensemble.compression.distillation.student import (
    check_step_type,
    predict_clean,
    rollout_to,
    sample_class_labels,
    with_network,
)
from ensemble.compression.distillation.teacher import Teacher, frozen_copy
from ensemble.compression.method import ExpertResult, StageError
from experts.condition import Condition
from experts.diffusion.few_step import FewStepSchedule
from experts.diffusion.noise_schedule import Latents, Times, expand
from experts.diffusion.predictions import training_target
from experts.expert import Expert, network_flops
from experts.networks.registry import call_network
from experts.training.latent_dataset import LatentDataset, derive_seed

BETAS = (0.0, 0.999)
"""Of both optimisers, as in all three papers."""
LEAST = 1e-5
"""Floor of the distance that the student's loss is divided by."""
NOISE_STREAM = 7
"""Purpose of random numbers; no other training shares their stream."""


def distill_sid(
    expert: Expert, dataset: LatentDataset, config: SiDConfig, workspace: Workspace, start: nn.Module | None = None
) -> ExpertResult:
    """A student of one expert, which begins with its parameters or with those of `start`; raises as `sid_of` does."""
    teacher, row = frozen_copy(expert, config.training.device), network_flops(expert.model, expert.latent_shape)
    begun = expert if start is None else replace(expert, model=start)
    return distill_sid_student(begun, expert.model, teacher, row, dataset, config, workspace)


def distill_sid_student(
    expert: Expert,
    fake: nn.Module,
    teacher: Teacher,
    row: float,
    dataset: LatentDataset,
    config: SiDConfig,
    workspace: Workspace,
) -> ExpertResult:
    """A student of `config.steps` steps; of the data only the classes are looked at.

    It begins with the expert's parameters, the fake score with those of `fake`; `row` is what the teacher's call on a
    row costs, in FLOPs. Raises `StageError` if guidance or renoising does not fit the expert, and what
    `train_in_turns` raises.
    """
    check_step_type(expert, config.step_type)
    _check_guidance(expert, dataset, config)
    started = time.monotonic()
    begun = {"student": expert.model, "fake": fake}
    networks = {name: deepcopy(model).requires_grad_(True) for name, model in begun.items()}
    turn = update_step(expert, teacher, dataset, config)
    learned = train_alternating(networks, turn, config.training, workspace, BETAS)
    return ExpertResult(
        expert=replace(expert, model=learned.models["student"], few_step=few_step_schedule(config), cache=None),
        modules=1,
        flops=sid_flops(network_flops(expert.model, expert.latent_shape), row, config),
        details={"losses": learned.rows, "seconds": time.monotonic() - started},
    )


def update_step(expert: Expert, teacher: Teacher, dataset: LatentDataset, config: SiDConfig) -> UpdateStep:
    """The updates of a step: the fake score's, then the student's, on samples of one of the student's times."""
    course, rows = few_step_schedule(config), config.training.batch_size

    def turn(networks: Mapping[str, nn.Module], step: int) -> Iterator[Update]:
        generator = torch.Generator().manual_seed(derive_seed(NOISE_STREAM, config.training.seed, step))
        device = next(networks["student"].parameters()).device
        student, fake = with_network(expert, networks["student"]), with_network(expert, networks["fake"])
        condition = sample_class_labels(dataset, rows, config.training.condition_dropout, generator).to(device)
        # Uniform mixture (2505.12674, section 3.2): one of the student's times, the same for both updates.
        last = int(torch.randint(config.steps, (), generator=generator))
        noise = torch.randn(last + 1, rows, *expert.latent_shape, generator=generator).to(device)
        with torch.no_grad():
            noised = rollout_to(student, list(noise), condition, course, last)
        clean = predict_clean(student, noised, noised.new_full((rows,), course.times[last]), condition)
        for _ in range(config.fake_score_updates):
            t, fresh = _drawn(config, expert, generator, device)
            scale = config.fake_training_guidance
            yield "fake", {"loss": fake_score_loss(fake, clean.detach(), fresh, t, condition, scale)}
        t, fresh = _drawn(config, expert, generator, device)
        with frozen_parameters(networks["fake"]):
            loss = student_loss(clean, fresh, t, condition, teacher, fake, config)
        yield "student", {"loss": loss}

    return turn


def few_step_schedule(config: SiDConfig) -> FewStepSchedule:
    """When the student is asked."""
    return FewStepSchedule.uniform(config.steps, config.step_type, start=config.start, is_distilled=True)


def student_loss(
    clean: Latents, noise: Latents, t: Times, condition: Condition, teacher: Teacher, fake: Expert, config: SiDConfig
) -> Float[Tensor, ""]:
    """The student's loss above, the mean over entries; differentiable by `clean`."""
    noised = teacher.noise_schedule.add_noise(clean, noise, t)
    real = predict_clean(teacher, noised, t, condition, config.teacher_guidance)
    said = predict_clean(fake, noised, t, condition, config.fake_guidance)
    apart = real - said
    size = (clean - real).abs().flatten(1).mean(1).detach().clamp(min=LEAST)
    weight = teacher.noise_schedule.alpha(t) / size if config.weighting == "signal" else 1 / size
    return (expand(weight, clean) * apart * ((real - clean) - config.alpha * apart)).mean()


def fake_score_loss(
    fake: Expert, clean: Latents, noise: Latents, t: Times, condition: Condition, guidance: float
) -> Float[Tensor, ""]:
    """What an expert learns from, on the student's samples in place of data."""
    noised = fake.noise_schedule.add_noise(clean, noise, t)
    said = call_network(fake.model, noised, t, condition).float()
    if guidance != 1:
        null = call_network(fake.model, noised, t, Condition.null(len(condition), noised.device)).float()
        said = null + guidance * (said - null)
    return functional.mse_loss(said, training_target(fake.prediction, clean, noise, t, fake.noise_schedule))


def sid_flops(own: float, teachers: float, config: SiDConfig) -> float:
    """Of the whole training, by those of a row; a backward pass costs two forward ones, one to the inputs alone one."""
    guided = [2 if scale not in {0, 1} else 1 for scale in (config.fake_guidance, config.teacher_guidance)]
    taught = 2 if config.fake_training_guidance != 1 else 1
    calls = (config.steps - 1) / 2 + 3 + 3 * taught * config.fake_score_updates + 2 * guided[0]
    rows = config.training.steps * config.training.batch_size
    return rows * (calls * own + 2 * guided[1] * teachers)


def _drawn(
    config: SiDConfig, expert: Expert, generator: torch.Generator, device: torch.device
) -> tuple[Times, Latents]:
    """A logit-normal t for every row, and noise."""
    rows = config.training.batch_size
    t = torch.randn(rows, generator=generator).mul(config.training.t_std).add(config.training.t_mean).sigmoid()
    noise = torch.randn(rows, *expert.latent_shape, generator=generator)
    return t.to(device), noise.to(device)


def _check_guidance(expert: Expert, dataset: LatentDataset, config: SiDConfig) -> None:
    scales = (config.teacher_guidance, config.fake_guidance, config.fake_training_guidance)
    if any(scale != 1 for scale in scales) and (expert.num_classes == 0 or bool((dataset.class_id < 0).all())):
        raise StageError(
            f"guidance {scales} needs an expert that was trained with classes, and expert {expert.cluster_id} knows "
            "none; set all three scales to 1"
        )
