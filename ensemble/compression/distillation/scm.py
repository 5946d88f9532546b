"""Continuous-time consistency distillation (sCM): a student's clean estimate is the same along a whole trajectory.

    x_s = cos(s) clean + sin(s) noise      F = d x / d s by the student      f = cos(s) x - sin(s) F
    loss: exp(w(s)) / D |F - F' - g / (|g| + c)|^2 - w(s),                 F' = F without gradient
    g = cos(s) d f / d s = -cos(s)^2 (F' - v) - r cos(s) sin(s) (x + d F' / d s),      r warms up from 0 to 1

v is the expert's velocity, and d F' / d s the derivative along it. Lu & Song 2024, arXiv:2410.11081, section 4; the
weight w is learned. Consistency covers the data but adds up its errors towards s = pi / 2. rCM (Zheng et al. 2025,
arXiv:2510.08431) corrects them at once on samples x of the student's few steps, by the reverse divergence:

    loss + weight |x - (x - (g - f) / |x - f|_1) without gradient|^2 / 2,        gradients through the last step alone

f and g are the clean estimates of the expert and of a fake score that follows the student. The student keeps the
expert's network and noise schedule: s is (pi / 2) t of the cosine schedule, to which `Expert.velocity` converts
exactly, at equal noise-to-signal ratio.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ddm_core.artifacts import Workspace
from ensemble.compression.common.alternating_trainer import Update, UpdateStep, train_alternating
from ensemble.compression.common.directional_derivative import DERIVATIVE_CALLS, directional_derivative
from ensemble.compression.distillation.config import SCMConfig
from ensemble.compression.distillation.sid import fake_score_loss
from ensemble.compression.distillation.sign import score_loss
from ensemble.compression.distillation.student import (
    check_can_distill,
    guided_velocity,
    predict_clean,
    rollout_to,
    with_network,
)
from ensemble.compression.distillation.teacher import Teacher, copy_as_teacher
from ensemble.compression.method import ExpertResult
from experts.conditions.condition import Condition
from experts.diffusion.few_step import FewStepSchedule
from experts.diffusion.noise_schedule import COSINE, HALF_PI, RECTIFIED_FLOW, expand
from experts.expert import Expert, network_flops
from experts.training.latent_dataset import LatentDataset, make_batch
from experts.types import Latents, Times

Angles = Times
"""s of every row, from 0 (clean) to pi / 2 (noise)."""
WEIGHT_WIDTH = 64
SCORE_T_MEAN, SCORE_T_STD = 0.7, 1.6
"""Mean and deviation of the logit of t in score distillation, as in that of `distill=sid`."""


class LossWeight(nn.Module):
    """w(s), a small network of the logarithm of the noise-to-signal ratio; 0 before training."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(1, WEIGHT_WIDTH), nn.Linear(WEIGHT_WIDTH, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, angle: Angles) -> Float[Tensor, " batch"]:
        """Return w of every row."""
        weight: Tensor = self.outer(nn.functional.silu(self.inner(angle.tan().log()[:, None])))
        return weight.squeeze(1)


def train_scm(expert: Expert, dataset: LatentDataset, config: SCMConfig, workspace: Workspace) -> ExpertResult:
    """Train a student of one expert; raises what `train_scm_student` raises."""
    teacher, teacher_flops = copy_as_teacher(expert, config.training.device)
    return train_scm_student(expert, teacher, teacher_flops, dataset, config, workspace)


def train_scm_student(
    expert: Expert,
    teacher: Teacher,
    teacher_flops: float,
    dataset: LatentDataset,
    config: SCMConfig,
    workspace: Workspace,
) -> ExpertResult:
    """Train a student from the expert's parameters; `teacher_flops` are those of the teacher on one row.

    Raises `StageError` for an expert that is a student already, guidance of one without conditions, or a network
    without derivative; and what `train_alternating` raises.
    """
    check_can_distill(expert, dataset, config.guidance)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        networks = {"student": deepcopy(expert.model).requires_grad_(True), "weight": LossWeight()}
    if config.score_weight:
        networks["fake"] = deepcopy(expert.model).requires_grad_(True)
    trained = train_alternating(
        networks, make_update_step(expert, teacher, dataset, config), config.training, workspace
    )
    return ExpertResult(
        expert=replace(expert, model=trained.models["student"], few_step=few_step_of(config), cache=None),
        modules=1,
        flops=scm_flops(network_flops(expert.model, expert.latent_shape), teacher_flops, config),
        details={"losses": trained.rows},
    )


def make_update_step(expert: Expert, teacher: Teacher, dataset: LatentDataset, config: SCMConfig) -> UpdateStep:
    """Return the training step: one update of the student, then one of the weight of its loss.

    With score distillation, the fake score is updated before both.
    """

    def update_step(networks: Mapping[str, nn.Module], step: int) -> Iterator[Update]:
        device = next(networks["student"].parameters()).device
        batch = make_batch(dataset, config.training, step).to(device)
        angle = RECTIFIED_FLOW.noise_to_signal(batch.t).atan()
        t, condition = angle / HALF_PI, batch.condition
        noised = COSINE.add_noise(batch.clean, batch.noise, t)
        student = with_network(expert, networks["student"])

        def slope(x: Latents, s: Angles) -> Latents:
            return angular_velocity(student, x, s, condition)

        with torch.no_grad():
            velocity = angular_velocity(teacher, noised, angle, condition, config.guidance)
        predicted = slope(noised, angle)
        warmup = min(1.0, (step + 1) / max(1, config.tangent_warmup_steps))
        tangent = consistency_tangent(
            student.model, slope, predicted.detach(), noised, angle, velocity, warmup, config.derivative_step
        )
        tangent = normalize(tangent, config.tangent_offset)
        squared = (predicted - predicted.detach() - tangent).square().flatten(1).mean(1)
        weight = networks["weight"](angle)
        losses = {"loss": (weight.detach().exp() * squared).mean(), "mse": squared.detach().mean()}
        if config.score_weight:
            fake = with_network(expert, networks["fake"])
            sample = sample_last_step(student, condition, config)
            yield "fake", {"loss": fake_score_loss(fake, sample.detach(), *_draw(sample), condition, 1.0)}
            score = score_loss(sample, *_draw(sample), condition, teacher, fake, config.guidance)
            losses |= {"loss": losses["loss"] + config.score_weight * score, "score": score.detach()}
        yield "student", losses
        yield "weight", {"loss": (weight.exp() * squared.detach() - weight).mean()}

    return update_step


def few_step_of(config: SCMConfig) -> FewStepSchedule:
    """Return the times at which the student is evaluated."""
    return FewStepSchedule.uniform(config.steps, "renoise", is_distilled=True)


def sample_last_step(student: Expert, condition: Condition, config: SCMConfig) -> Latents:
    """Return clean estimates at one of the student's times, the same for all rows, with gradients of that call alone.

    Noise and time come from torch's global generator.
    """
    few_step, rows = few_step_of(config), len(condition)
    last, device = int(torch.randint(config.steps, ())), condition.class_id.device
    noise = [torch.randn(rows, *student.latent_shape).to(device) for _ in range(last + 1)]
    with torch.no_grad():
        noised = rollout_to(student, noise, condition, few_step, last)
    return predict_clean(student, noised, noised.new_full((rows,), few_step.times[last]), condition)


def _draw(sample: Latents) -> tuple[Latents, Times]:
    """Return fresh noise and a logit-normal t of every row, from torch's global generator."""
    t = torch.randn(len(sample)).mul(SCORE_T_STD).add(SCORE_T_MEAN).sigmoid()
    return torch.randn(sample.shape).to(sample), t.to(sample)


def angular_velocity(
    teacher: Teacher, noised: Latents, angle: Angles, condition: Condition, guidance: float = 1.0
) -> Latents:
    """Return d noised / d s on the circle cos(s) clean + sin(s) noise."""
    return guided_velocity(teacher, noised, angle / HALF_PI, condition, guidance, COSINE) / HALF_PI


def consistency_tangent(
    model: nn.Module,
    slope: Callable[[Latents, Angles], Latents],
    predicted: Latents,
    noised: Latents,
    angle: Angles,
    velocity: Latents,
    warmup: float = 1.0,
    step: float = 0.0,
) -> Latents:
    """Return g above, from the student's `slope` F and its value; all zeros for the consistency function of v."""
    cos, sin = expand(angle.cos(), noised), expand(angle.sin(), noised)
    derivative = directional_derivative(model, slope, (noised, angle), velocity, step, (0.0, HALF_PI))
    return -(cos**2) * (predicted - velocity) - warmup * cos * sin * (noised + derivative)


def normalize(tangent: Latents, offset: float) -> Latents:
    """Return g / (|g| + offset), row by row."""
    norm = torch.linalg.vector_norm(tangent.flatten(1), dim=1)
    return tangent / expand(norm + offset, tangent)


def scm_flops(student_flops: float, teacher_flops: float, config: SCMConfig) -> float:
    """Return the FLOPs of the training, from those of a row: a call with gradient, a derivative, and the teacher's.

    Score distillation adds samples with gradients of one call, and two calls of the fake score, one with gradients.
    """
    rows, has_score = config.training.steps * config.training.batch_size, config.score_weight > 0
    student_calls = 3 + DERIVATIVE_CALLS + has_score * ((config.steps - 1) / 2 + 3 + 3 + 1)
    return rows * (student_calls * student_flops + (1 + has_score) * (1 + (config.guidance != 1)) * teacher_flops)
