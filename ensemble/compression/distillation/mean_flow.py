"""Mean flows: a student predicts the average velocity u over a jump from t to an earlier r, which is one call.

    u(x_t, r, t) = v(x_t, t) - (t - r) (d u / d x v + d u / d t)     the average of v over [r, t], differentiated by t

The loss is the squared distance of u to the right side without its gradient, the derivative by forward-mode
differentiation. Jumps of no length train the velocity itself. Geng et al. 2025, arXiv:2505.13447; Geng et al. 2025
(iMF), arXiv:2512.02012: the derivative follows the student's own velocity instead of that of one sample and noise. The
student starts from the expert, whose time embedding gets one of the jump's length beside it. The identity holds on any
noise schedule, as the velocity there is d noised / dt.

With guidance v is v(null) + w (v - v(null)). iMF makes w an input: every row of a batch has another one, drawn with a
density of 1 / w up to `max_guidance`.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ddm_core.artifacts import Workspace
from ddm_core.random_bits import Stream
from ensemble.compression.common.alternating_trainer import Update, UpdateStep, train_alternating
from ensemble.compression.common.directional_derivative import DERIVATIVE_CALLS, directional_derivative
from ensemble.compression.distillation.config import MeanFlowConfig
from ensemble.compression.distillation.student import check_can_distill, guided_velocity, with_network
from ensemble.compression.distillation.teacher import Teacher, copy_as_teacher
from ensemble.compression.method import ExpertResult
from experts.compressed.distillation.interval_embedding import jumping
from experts.conditions.condition import Condition
from experts.config import TrainingConfig
from experts.diffusion.few_step import FewStepSchedule
from experts.diffusion.noise_schedule import expand, shift_times
from experts.expert import Expert, network_flops
from experts.networks.registry import extend_by_intervals
from experts.training.latent_dataset import LatentDataset, derive_seed, make_batch
from experts.types import Latents, RowTimes, Times

MIN_SQUARED_ERROR = 1e-3
"""Added to a row's squared error in its weight, as in Geng et al."""


def train_mean_flow(
    expert: Expert, dataset: LatentDataset, config: MeanFlowConfig, workspace: Workspace
) -> ExpertResult:
    """Train a student of one expert; raises what `train_mean_flow_student` raises."""
    teacher, teacher_flops = copy_as_teacher(expert, config.training.device)
    return train_mean_flow_student(expert, teacher, teacher_flops, dataset, config, workspace)


def train_mean_flow_student(
    expert: Expert,
    teacher: Teacher,
    teacher_flops: float,
    dataset: LatentDataset,
    config: MeanFlowConfig,
    workspace: Workspace,
) -> ExpertResult:
    """Train a student from the expert's parameters; `teacher_flops` are those of the teacher on one row.

    Raises `StageError` for an expert that is a student already, guidance of one without conditions, or a network
    without derivative; `NetworkError` for one without embedding of t; and what `train_alternating` raises.
    """
    takes_scale = config.max_guidance is not None
    check_can_distill(
        expert, dataset, config.max_guidance or config.guidance, "max_guidance" if takes_scale else "guidance"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        student = extend_by_intervals(deepcopy(expert.model), has_guidance=takes_scale).requires_grad_(True)
    trained = train_alternating(
        {"student": student}, make_update_step(expert, teacher, dataset, config), config.training, workspace
    )
    few_step = FewStepSchedule.uniform(config.steps, "average", is_distilled=True)
    return ExpertResult(
        expert=replace(expert, model=trained.models["student"], few_step=few_step, cache=None),
        modules=1,
        flops=mean_flow_flops(network_flops(expert.model, expert.latent_shape), teacher_flops, config),
        details={"losses": trained.rows},
    )


def make_update_step(expert: Expert, teacher: Teacher, dataset: LatentDataset, config: MeanFlowConfig) -> UpdateStep:
    """Return the training step: a single update of the student."""

    def update_step(networks: Mapping[str, nn.Module], step: int) -> Iterator[Update]:
        batch = make_batch(dataset, config.training, step)
        t, r = sample_jumps(batch.t, config, step)
        device = next(networks["student"].parameters()).device
        batch, t, r = batch.to(device), t.to(device), r.to(device)
        student, noise_schedule = with_network(expert, networks["student"]), expert.noise_schedule
        noised = noise_schedule.add_noise(batch.clean, batch.noise, t)
        velocity = noise_schedule.velocity(batch.clean, batch.noise, t)
        scale = None if config.max_guidance is None else sample_scales(len(t), config.max_guidance).to(t)
        flow = MeanFlow(student=student, teacher=teacher, condition=batch.condition, scale=scale)
        target = flow.target(noised, t, r, velocity, config)
        yield "student", mean_flow_losses(flow.average(noised, t, r), target, error_power(config))

    return update_step


def velocity_share(config: MeanFlowConfig) -> float:
    """Return the share of jumps without length."""
    if config.velocity_share is not None:
        return config.velocity_share
    return 0.0 if config.velocity == "expert" else 0.5


def error_power(config: MeanFlowConfig) -> float:
    """Return the power of the squared error by which a row is divided."""
    if config.power is not None:
        return config.power
    return 0.5 if config.velocity == "expert" else 1.0


def sample_jumps(t: Times, config: MeanFlowConfig, step: int) -> tuple[Times, Times]:
    """Return the start t and the end r <= t of every row's jump; both ends have the training's distribution of t."""
    training: TrainingConfig = config.training
    generator = torch.Generator().manual_seed(derive_seed(Stream.MEAN_FLOW, training.seed, step))
    other = torch.randn(len(t), generator=generator).mul(training.t_std).add(training.t_mean).sigmoid()
    other = shift_times(other, training.t_shift)
    is_velocity = torch.rand(len(t), generator=generator) < velocity_share(config)
    other = torch.where(is_velocity, t, other)
    return torch.maximum(t, other), torch.minimum(t, other)


def sample_scales(rows: int, max_guidance: float) -> RowTimes:
    """Return guidance scales from 1 to `max_guidance`, with equal logarithmic spacing; from the global generator."""
    return max_guidance ** torch.rand(rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanFlow:
    """A student on the rows of one batch, and what its target is made of."""

    student: Expert
    teacher: Teacher
    condition: Condition
    scale: RowTimes | None = None
    """Guidance scale of every row, an input of the student; None is that of the configuration, which is not."""

    def average(self, noised: Latents, t: Times, r: Times) -> Latents:
        """Return the student's average velocity from t to r."""
        condition = self.condition if self.scale is None else self.condition.guided(self.scale)
        with jumping(self.student.model, t - r):
            return self.student.velocity(noised, t, condition)

    def rows(self, index: Tensor) -> "MeanFlow":
        """Return the same of some rows."""
        scale = None if self.scale is None else self.scale[index]
        return replace(self, condition=self.condition.rows(index), scale=scale)

    def guided(self, noised: Latents, t: Times, velocity: Latents, config: MeanFlowConfig) -> Latents:
        """Return the velocity with guidance, from the expert's or from that of the samples and their noise."""
        if self.scale is None and config.velocity == "expert":
            return guided_velocity(self.teacher, noised, t, self.condition, config.guidance)
        if config.velocity == "expert":
            velocity = self.teacher.velocity(noised, t, self.condition)
        if self.scale is None and config.guidance == 1:
            return velocity
        nothing = Condition.null(len(t), noised.device)
        if config.velocity == "expert":
            null = self.teacher.velocity(noised, t, nothing)
        else:
            null = replace(self, condition=nothing, scale=None).average(noised, t, t)
        scale = torch.full_like(t, config.guidance) if self.scale is None else self.scale
        return null + expand(torch.where(self.condition.is_null, 1.0, scale).to(noised), noised) * (velocity - null)

    def target(self, noised: Latents, t: Times, r: Times, velocity: Latents, config: MeanFlowConfig) -> Latents:
        """Return v - (t - r) du/dt, without gradient; `velocity` is that of the samples and their noise."""
        with torch.no_grad():
            velocity = self.guided(noised, t, velocity, config)
            (jumps,) = (t > r).nonzero(as_tuple=True)
            if not len(jumps):
                return velocity
            part = self.rows(jumps)
            noised, t, r = noised[jumps], t[jumps], r[jumps]
            along = part.average(noised, t, t) if config.velocity == "student" else velocity[jumps]
            derivative = directional_derivative(
                self.student.model,
                lambda x, time: part.average(x, time, r),
                (noised, t),
                along,
                config.derivative_step,
                (r, 1.0),
            )
            return velocity.index_add(0, jumps, -expand(t - r, noised) * derivative)


def mean_flow_losses(average: Latents, target: Latents, power: float) -> dict[str, Float[Tensor, ""]]:
    """Return the weighted mean over rows of the squared distances, and without weights that of an element."""
    squared = (average - target).square().flatten(1).sum(1)
    weight = (squared.detach() + MIN_SQUARED_ERROR) ** -power
    return {"loss": (weight * squared).mean(), "mse": squared.detach().mean() / average[0].numel()}


def mean_flow_flops(student_flops: float, teacher_flops: float, config: MeanFlowConfig) -> float:
    """Return the FLOPs of the training, from those of a row: a call with gradient, and what the target takes."""
    rows, jumps = config.training.steps * config.training.batch_size, 1 - velocity_share(config)
    guided = config.guidance != 1 or config.max_guidance is not None
    student_calls = 3 + jumps * (DERIVATIVE_CALLS + (config.velocity == "student"))
    if config.velocity == "expert":
        return rows * (student_calls * student_flops + (1 + guided) * teacher_flops)
    return rows * (student_calls + guided) * student_flops
