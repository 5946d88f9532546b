"""Sampling of a few-step student in training: rollouts, clean predictions and class labels."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ensemble.compression.distillation.teacher import Teacher
from ensemble.compression.method import StageError
from ensemble.solvers import VelocityField, euler_step, renoise_step, scale_initial_noise
from experts.conditions.condition import Condition
from experts.diffusion.few_step import FewStepSchedule, StepType
from experts.diffusion.noise_schedule import NoiseSchedule
from experts.diffusion.predictions import to_clean
from experts.expert import Expert
from experts.training.latent_dataset import LatentDataset
from experts.types import Latents, Times


def check_step_type(expert: Expert, step_type: StepType) -> None:
    """Raise `StageError` if an Euler step on the expert's noise schedule does not end at its clean estimate."""
    if step_type == "euler" and expert.noise_schedule.name != "rectified_flow":
        raise StageError(
            f"step_type=euler takes straight steps, and expert {expert.cluster_id} has the curved noise schedule "
            f"{expert.noise_schedule.name}, where such a step does not end at the clean estimate; set "
            "distill.step_type=renoise"
        )


def with_network(expert: Expert, model: nn.Module) -> Expert:
    """Return the expert with another network."""
    return replace(expert, model=model)


def predict_clean(teacher: Teacher, noised: Latents, t: Times, condition: Condition, guidance: float = 1.0) -> Latents:
    """Return the clean estimate f of a velocity, with guidance f(null) + guidance (f(condition) - f(null))."""
    if guidance == 0:
        condition = Condition.null(len(condition), noised.device)
    clean = to_clean("velocity", teacher.velocity(noised, t, condition), noised, t, teacher.noise_schedule)
    if guidance in {0, 1}:
        return clean
    null = predict_clean(teacher, noised, t, condition, 0.0)
    return null + guidance * (clean - null)


def guided_velocity(
    teacher: Teacher,
    noised: Latents,
    t: Times,
    condition: Condition,
    guidance: float,
    noise_schedule: NoiseSchedule | None = None,
) -> Latents:
    """Return a teacher's velocity with guidance on `noise_schedule` (default: the teacher's)."""
    velocity = teacher.velocity(noised, t, condition, noise_schedule)
    if guidance == 1:
        return velocity
    null = teacher.velocity(noised, t, Condition.null(len(condition), noised.device), noise_schedule)
    return null + guidance * (velocity - null)


def check_can_distill(expert: Expert, dataset: LatentDataset, guidance: float, name: str = "guidance") -> None:
    """Raise `StageError` for an expert that is a student already, and for guidance of an expert without conditions.

    `name` is that of the setting.
    """
    if expert.few_step is not None:
        raise StageError(
            f"this method needs experts that can be evaluated at any t, and expert {expert.cluster_id} is a few-step "
            "student; leave out the stage before"
        )
    if guidance != 1 and not (expert.is_conditional and dataset.has_conditions):
        raise StageError(
            f"distill.{name}={guidance} needs an expert that was trained with classes or text, and expert "
            f"{expert.cluster_id} has none; set it to {'1' if name == 'guidance' else 'null'}"
        )


def rollout_to(
    expert: Expert, noise: Sequence[Latents], condition: Condition, few_step: FewStepSchedule, last: int
) -> Latents:
    """Return the noised sample at time number `last` of the few-step schedule, before the student is evaluated there.

    `noise` is the initial noise, then one for every later time, which only renoising steps use.
    """
    noised = scale_initial_noise(noise[0], few_step, expert.noise_schedule)
    for index, (t, t_next) in enumerate(zip(few_step.times[:last], few_step.times[1 : last + 1], strict=True)):
        if few_step.step_types[index] == "renoise":
            noised = renoise_step(
                _velocity_field(expert, condition), noised, t, t_next, expert.noise_schedule, noise[index + 1]
            )
        else:
            noised = euler_step(_velocity_field(expert, condition), noised, t, t_next)
    return noised


def sample_student(expert: Expert, noise: Latents, condition: Condition, times: Sequence[float]) -> Latents:
    """Sample clean latents by Euler's method through all `times` to 0, with the gradient memory of a single step."""

    def step(noised: Latents, t: float, t_next: float) -> Latents:
        return euler_step(_velocity_field(expert, condition), noised, t, t_next)

    noised = noise
    for t, t_next in zip(times, (*times[1:], 0.0), strict=True):
        if torch.is_grad_enabled():
            noised = checkpoint(step, noised, t, t_next, use_reentrant=False)
        else:
            noised = step(noised, t, t_next)
    return noised


def sample_conditions(dataset: LatentDataset, rows: int, dropout: float, generator: torch.Generator) -> Condition:
    """Sample conditions as frequent as in the cluster, some of them dropped as in training; no latents are read."""
    index: Int[Tensor, " row"] = torch.randint(len(dataset), (rows,), generator=generator)
    condition = dataset.condition(index).drop(torch.rand(rows, generator=generator) < dropout)
    return condition if condition.text is None else condition.drop_one(torch.rand(rows, generator=generator))


def _velocity_field(expert: Expert, condition: Condition) -> VelocityField:
    return lambda noised, t: expert.velocity(noised, t, condition)
