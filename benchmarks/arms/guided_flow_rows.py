"""Row of `benchmarks.papers` on mean flows that take the guidance scale as an input.

Errors are relative distances of samples in two jumps to those of the guided expert in 50 steps from the same noise.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.arms.few_step_rows import TEACHER_STEPS, TRAINING
from benchmarks.arms.paper_networks import select_digits, train_digits
from benchmarks.arms.paper_row import PaperRow
from ddm_core.artifacts import Workspace
from ensemble.compression.distillation.config import MeanFlowConfig
from ensemble.compression.distillation.mean_flow import train_mean_flow
from ensemble.compression.distillation.student import guided_velocity
from ensemble.solvers import euler, make_noise, sample_few_step, uniform_times
from experts.conditions.condition import Condition
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from experts.types import Latents

SCALES, MAX_GUIDANCE, JUMPS = (1.0, 3.0), 4.0, 2
FLOW = MeanFlowConfig(velocity="expert", steps=JUMPS, training=TRAINING)


def measure_guided_flow(folder: Path) -> PaperRow:
    """Train a mean flow for every scale up to four, and others for one scale each."""
    teacher, data = train_digits("dit", folder)
    configs = {"any": replace(FLOW, max_guidance=MAX_GUIDANCE)}
    configs |= {f"{scale:g}": replace(FLOW, guidance=scale) for scale in SCALES}
    students = {
        name: train_mean_flow(teacher, data, config, Workspace.at(folder / f"guided flow {name}")).network
        for name, config in configs.items()
    }
    held_out = select_digits("dit", held_out=True)
    condition = held_out.condition(torch.arange(len(held_out)))
    exact = {scale: _guided_samples(teacher, condition, scale) for scale in SCALES}
    errors = {scale: _error(_samples(students["any"], condition.guided(scale)), exact[scale]) for scale in SCALES}
    alone = {scale: _error(_samples(students[f"{scale:g}"], condition), exact[scale]) for scale in SCALES}
    wrong = _error(_samples(students["any"], condition.guided(SCALES[0])), exact[SCALES[-1]])
    ratios = {scale: errors[scale] / alone[scale] for scale in SCALES}
    return PaperRow(
        paper="iMF (2512.02012), guidance as an input",
        says="one student follows every guidance scale in one call a jump, as well as students of one scale",
        file="ensemble/compression/distillation/mean_flow.py",
        command="ddm compress RUN distill=mean_flow distill.velocity=expert distill.max_guidance=4",
        criterion="two jumps: error at 1 and 3 ≤ 1.1 × of a student of that scale; the scale 1 for 3: ≥ 1.3 ×",
        ours=(
            f"{'; '.join(f'scale {scale:g}: {errors[scale]:.3f} ({ratios[scale]:.2f} ×)' for scale in SCALES)}; "
            f"scale 1 for 3: {wrong:.3f} ({wrong / errors[SCALES[-1]]:.2f} ×)"
        ),
        theirs="FID 1.72 in one call on ImageNet 256, at a scale that is chosen afterwards",
        differs=f"distilled from the expert in {TRAINING.steps} steps; scales up to {MAX_GUIDANCE:g}; no interval of t",
        holds=max(ratios.values()) <= 1.1 and wrong >= 1.3 * errors[SCALES[-1]],
    )


@torch.inference_mode()
def _samples(student: Expert, condition: Condition) -> Latents:
    if student.few_step is None:
        raise ValueError("a student has a few-step schedule; this expert has none")
    noise = make_noise(range(len(condition)), student.latent_shape)
    return sample_few_step(
        lambda noised, t: student.velocity(noised, t, condition),
        noise,
        student.few_step,
        RECTIFIED_FLOW,
        lambda step: noise,
    )


@torch.inference_mode()
def _guided_samples(teacher: Expert, condition: Condition, scale: float) -> Latents:
    noise = make_noise(range(len(condition)), teacher.latent_shape)
    return euler(
        lambda noised, t: guided_velocity(teacher, noised, t, condition, scale), noise, uniform_times(TEACHER_STEPS)
    )


def _error(samples: Latents, exact: Latents) -> float:
    return float((samples - exact).norm() / exact.norm())


ROWS: Mapping[str, Callable[[Path], PaperRow]] = {"guided_flow": measure_guided_flow}
