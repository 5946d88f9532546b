"""A few-step student's way from noise to a clean latent, at its own few t, on the expert's own path."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ensemble.compression.distillation.teacher import Teacher
from ensemble.compression.method import StageError
from ensemble.solvers import VelocityField, euler_step, renoise_step, scale_initial_noise
from experts.condition import Condition
from experts.diffusion.few_step import FewStepSchedule, StepType
from experts.diffusion.noise_schedule import Latents, Times
from experts.diffusion.predictions import to_clean
from experts.expert import Expert
from experts.training.latent_dataset import LatentDataset


def check_step_type(expert: Expert, way: StepType) -> None:
    """Raise `StageError` if a step of Euler's method on the expert's path does not end at its clean estimate."""
    if way == "euler" and expert.noise_schedule.name != "rectified_flow":
        raise StageError(
            f"step_type=euler takes straight steps, and expert {expert.cluster_id} is on the {expert.noise_schedule.name} path, "
            "where one straight step from noise does not end at what the student calls clean; take step_type=renoise"
        )


def with_network(expert: Expert, model: nn.Module) -> Expert:
    """The expert with another network in its place."""
    return replace(expert, model=model)


def predict_clean(teacher: Teacher, noised: Latents, t: Times, condition: Condition, guidance: float = 1.0) -> Latents:
    """The clean sample that a velocity implies, guided by f(null) + guidance (f(condition) - f(null))."""
    if guidance == 0:
        condition = Condition.null(len(condition), noised.device)
    said = to_clean("velocity", teacher.velocity(noised, t, condition), noised, t, teacher.noise_schedule)
    if guidance in {0, 1}:
        return said
    null = predict_clean(teacher, noised, t, condition, 0.0)
    return null + guidance * (said - null)


def rollout_to(
    expert: Expert, noise: Sequence[Latents], condition: Condition, course: FewStepSchedule, last: int
) -> Latents:
    """What a sample of this student is at time number `last` of its course, where the student is not asked yet.

    `noise` is that of its beginning, then that of every later time, used where a step wants some.
    """
    noised = scale_initial_noise(noise[0], course, expert.noise_schedule)
    for index, (t, t_next) in enumerate(zip(course.times[:last], course.times[1 : last + 1], strict=True)):
        if course.step_types[index] == "renoise":
            noised = renoise_step(_field(expert, condition), noised, t, t_next, expert.noise_schedule, noise[index + 1])
        else:
            noised = euler_step(_field(expert, condition), noised, t, t_next)
    return noised


def sample_student(expert: Expert, noise: Latents, condition: Condition, times: Sequence[float]) -> Latents:
    """Clean latents by Euler's method through all of `times` down to 0, at the memory of a single step's gradients."""

    def step(noised: Latents, t: float, t_next: float) -> Latents:
        return euler_step(_field(expert, condition), noised, t, t_next)

    noised = noise
    for t, t_next in zip(times, (*times[1:], 0.0), strict=True):
        if torch.is_grad_enabled():
            noised = checkpoint(step, noised, t, t_next, use_reentrant=False)
        else:
            noised = step(noised, t, t_next)
    return noised


def sample_class_labels(dataset: LatentDataset, rows: int, dropout: float, generator: torch.Generator) -> Condition:
    """Conditions as frequent as in the cluster, some of them dropped; of the samples themselves nothing is read."""
    index: Int[Tensor, " row"] = torch.randint(len(dataset), (rows,), generator=generator)
    return Condition(dataset.class_id[index]).drop(torch.rand(rows, generator=generator) < dropout)


def _field(expert: Expert, condition: Condition) -> VelocityField:
    return lambda noised, t: expert.velocity(noised, t, condition)
