"""Rows of `benchmarks.papers` on few steps: students of one network on digits, and drafts that a trained refiner ends.

Distances are squared MMDs of samples to held-out digits, those of students over that of the teacher in 50 Euler steps.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.arms.paper_networks import select_digits, train_digits
from benchmarks.arms.paper_row import PaperRow
from ddm_core.artifacts import Workspace
from ensemble.compression.acceleration.config import TruncateConfig
from ensemble.compression.acceleration.refiner_training import train_refiner
from ensemble.compression.acceleration.truncated_start import fit_anchors, measure_distance
from ensemble.compression.distillation.config import ConsistencyConfig, MeanFlowConfig, SCMConfig
from ensemble.compression.distillation.consistency import train_consistency
from ensemble.compression.distillation.mean_flow import train_mean_flow
from ensemble.compression.distillation.mmd import FINE, median_kernel, squared_mmd
from ensemble.compression.distillation.scm import train_scm
from ensemble.multi_network_experts import TruncatedExpert
from ensemble.solvers import make_noise, sample_few_step
from experts.conditions.condition import Condition
from experts.config import TrainingConfig
from experts.diffusion.few_step import FewStepSchedule, StepType
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from experts.types import Latents

TEACHER_STEPS, REPEATS = 50, 4
TRAINING = TrainingConfig(
    steps=600, batch_size=64, lr=1e-3, warmup_steps=30, t_mean=0.4, t_std=1.6, checkpoint_every=10**6
)
SCM_TRAINING = replace(TRAINING, t_mean=-0.3, t_std=1.4)
SCORE_WEIGHTS = (1.0,)
"""Weights of score distillation; the first is judged."""
TRAINING_OF_REFINERS = TrainingConfig(steps=300, batch_size=64, lr=1e-3, warmup_steps=20, checkpoint_every=10**6)
STARTS = (0.2, 0.35, 0.5, 0.7)


def distance_of(expert: Expert, steps: int, step_type: StepType) -> float:
    """Return the mean squared MMD of samples to held-out digits of the same classes."""
    held_out, few_step = select_digits("dit", held_out=True), FewStepSchedule.uniform(steps, step_type)
    real, condition = held_out.clean.flatten(1), held_out.condition(torch.arange(len(held_out)))
    kernel, classes = median_kernel("rbf", real, FINE), (condition.class_id, condition.class_id)
    student, total = replace(expert, few_step=few_step), 0.0
    for repeat in range(REPEATS):
        seeds = range(repeat * len(real), (repeat + 1) * len(real))
        with torch.inference_mode():
            samples = sample_few_step(
                lambda noised, t: student.velocity(noised, t, condition),
                make_noise(seeds, expert.latent_shape),
                few_step,
                RECTIFIED_FLOW,
                lambda step, seeds=seeds: make_noise(seeds, expert.latent_shape, 1 + step),
            )
        total += float(squared_mmd(samples.flatten(1), real, kernel, classes))
    return total / REPEATS


def ratios_of(expert: Expert, step_type: StepType, teacher: Expert) -> list[float]:
    """Return the distances in 1, 2 and 4 steps over the teacher's in 50."""
    whole = distance_of(teacher, TEACHER_STEPS, "euler")
    return [distance_of(expert, steps, step_type) / whole for steps in (1, 2, 4)]


def measure_mean_flow(folder: Path) -> PaperRow:
    """Train mean flows with and without the expert's velocity, and with the exact derivative."""
    teacher, data = train_digits("dit", folder)
    configs = {
        "expert": MeanFlowConfig(training=TRAINING, velocity="expert"),
        "no teacher": MeanFlowConfig(training=TRAINING),
        "exact": MeanFlowConfig(training=TRAINING, velocity="expert", derivative_step=0),
    }
    ratios = {
        name: ratios_of(
            train_mean_flow(teacher, data, config, Workspace.at(folder / f"flow {name}")).network, "average", teacher
        )
        for name, config in configs.items()
    }
    best = min((ratios["expert"], ratios["no teacher"]), key=lambda values: values[0])
    return PaperRow(
        paper="MeanFlow (2505.13447), iMF (2512.02012)",
        says="average velocities turn noise to a sample in one call",
        file="ensemble/compression/distillation/mean_flow.py",
        command="ddm compress RUN distill=mean_flow",
        criterion="over the teacher's MMD in 50 steps: one call ≤ 1.2, two ≤ 1; exact derivatives by t: worse in one",
        ours=(
            f"1, 2, 4 calls: expert's velocity {_joined(ratios['expert'])}; no teacher "
            f"{_joined(ratios['no teacher'])}; exact derivative {_joined(ratios['exact'])}; "
            f"plain {_joined(ratios_of(teacher, 'euler', teacher))}"
        ),
        theirs="FID 3.43 (iMF 1.72) in one call on ImageNet 256",
        differs="warm start from the expert; derivatives over .2 of t; 600 training steps",
        holds=best[0] <= 1.2 and best[1] <= 1 and ratios["exact"][0] > ratios["expert"][0],
    )


def measure_scm(folder: Path) -> PaperRow:
    """Distill consistency students in continuous time, and at discrete times for comparison."""
    teacher, data = train_digits("dit", folder)
    ratios = {
        name: ratios_of(
            train_scm(teacher, data, config, Workspace.at(folder / f"scm {name}")).network, "renoise", teacher
        )
        for name, config in {
            "window": SCMConfig(training=SCM_TRAINING, tangent_warmup_steps=300),
            "exact": SCMConfig(training=SCM_TRAINING, tangent_warmup_steps=300, derivative_step=0),
        }.items()
    }
    discrete = ConsistencyConfig(training=TRAINING, teacher=True)
    student = train_consistency(teacher, data, discrete, Workspace.at(folder / "discrete")).network
    discrete_ratios = ratios_of(student, "renoise", teacher)
    return PaperRow(
        paper="sCM (2410.11081)",
        says="consistency in continuous time with normalized tangents has no discretization error",
        file="ensemble/compression/distillation/scm.py",
        command="ddm compress RUN distill=scm",
        criterion="over the teacher's MMD in 50 steps: one call ≤ 1.2, two ≤ 1; less than at discrete times",
        ours=(
            f"1, 2, 4 calls: {_joined(ratios['window'])}; exact derivative {_joined(ratios['exact'])}; discrete times "
            f"{_joined(discrete_ratios)}"
        ),
        theirs="FID 1.88 in two calls on ImageNet 512, within 10 % of the teacher",
        differs="the expert's own noise schedule, by a change of variables; derivatives over .04 of s",
        holds=ratios["window"][0] <= min(1.2, discrete_ratios[0]) and ratios["window"][1] <= 1,
    )


def measure_rcm(folder: Path) -> PaperRow:
    """Add score distillation to continuous-time consistency, with several weights."""
    teacher, data = train_digits("dit", folder)
    students = {
        weight: train_scm(
            teacher,
            data,
            SCMConfig(training=SCM_TRAINING, tangent_warmup_steps=300, score_weight=weight),
            Workspace.at(folder / f"rcm {weight}"),
        ).network
        for weight in (0.0, *SCORE_WEIGHTS)
    }
    ratios = {weight: ratios_of(student, "renoise", teacher) for weight, student in students.items()}
    chosen = ratios[SCORE_WEIGHTS[0]]
    return PaperRow(
        paper="rCM (2510.08431)",
        says="score distillation on the student's own samples corrects what consistency adds up",
        file="ensemble/compression/distillation/scm.py",
        command=f"ddm compress RUN distill=scm distill.score_weight={SCORE_WEIGHTS[0]:g}",
        criterion="over the teacher's MMD in 50 steps: one call ≤ 1.2, two ≤ 1; without the term: not",
        ours="; ".join(f"weight {weight:g}: {_joined(values)} in 1, 2, 4 calls" for weight, values in ratios.items()),
        theirs="as good as DMD2 with more diversity, 1 to 4 steps, up to 14 B parameters",
        differs="600 training steps; every step updates student and fake score once",
        holds=chosen[0] <= 1.2 and chosen[1] <= 1 and (ratios[0.0][0] > 1.2 or ratios[0.0][1] > 1),
    )


def measure_truncated_training(folder: Path) -> PaperRow:
    """Refine anchors in two steps, by experts that were trained below several start times."""
    expert, data = train_digits("dit", folder)
    held_out, config = select_digits("dit", held_out=True), TruncateConfig(tune="data", tuning=TRAINING_OF_REFINERS)
    few_step = FewStepSchedule.uniform(2, "euler")
    truncated = TruncatedExpert(
        draft=fit_anchors(data, expert.num_classes, config), refiner=replace(expert, few_step=few_step)
    )
    draft, noise = (measure_distance(truncated, held_out, config, start=t) for t in (0.0, 1.0))
    plain, tuned = dict[float, float](), dict[float, float]()
    for t in STARTS:
        trained, _ = train_refiner(truncated, data, t, config, Workspace.at(folder / f"refiner {t}"))
        plain[t], tuned[t] = (measure_distance(each, held_out, config, start=t) for each in (truncated, trained))
    best = min(tuned, key=lambda t: tuned[t])
    return PaperRow(
        paper="CAT-DM (2311.18405)",
        says="two steps from a noised draft suffice for a model that is trained below that noise",
        file="ensemble/compression/acceleration/refiner_training.py",
        command="ddm compress RUN accelerate=truncate accelerate.tune=data",
        criterion="MMD ≤ .2 × two steps from noise and < the draft's; best start inside the grid; < untrained",
        ours=(
            f"{tuned[best] / noise:.3f} × noise, {tuned[best] / draft:.3f} × draft at t = {best:g}, untrained "
            f"{plain[best]:.4f}; starts {', '.join(f'{t:g} {value:.4f}' for t, value in tuned.items())}"
        ),
        theirs="VITON-HD FID 5.60 in 2 steps, 7.11 in 16 from noise",
        differs="drafts are 64 centroids instead of a GAN's pictures",
        holds=tuned[best] <= 0.2 * noise
        and tuned[best] < min(draft, plain[best])
        and best not in (STARTS[0], STARTS[-1]),
    )


def measure_anchors(folder: Path) -> PaperRow:
    """Compare the best of a sample of every anchor with the best of as many samples in 20 steps from noise."""
    expert, data = train_digits("dit", folder)
    real = select_digits("dit", held_out=True).clean.flatten(1)
    config = TruncateConfig(tune="anchors", tuning=TRAINING_OF_REFINERS, anchors=20)
    truncated = TruncatedExpert(
        draft=fit_anchors(data, expert.num_classes, config),
        refiner=replace(expert, few_step=FewStepSchedule.uniform(2, "euler", start=0.2)),
    )
    trained, _ = train_refiner(truncated, data, 0.2, config, Workspace.at(folder / "refiner of anchors"))
    anchors = fit_anchors(data, expert.num_classes, config).means
    samples = {name: refine_all(each, anchors) for name, each in (("trained", trained), ("untrained", truncated))}
    samples |= {"anchors": anchors, "random": refine_all(trained, make_noise(range(20), expert.latent_shape, 3))}
    from_noise = replace(expert, few_step=FewStepSchedule.uniform(20, "euler"))
    samples["20 steps"] = refine_all(replace(truncated, refiner=from_noise), anchors)
    errors = {name: float(torch.cdist(real, each.flatten(1)).min(1).values.mean()) for name, each in samples.items()}
    spreads = {name: float(torch.pdist(each.flatten(1)).mean()) for name, each in samples.items()}
    return PaperRow(
        paper="DiffusionDrive (2411.15139)",
        says="trained from noised anchors, two steps give better and more diverse candidates than twenty from noise",
        file="ensemble/compression/acceleration/refiner_training.py",
        command="ddm compress RUN accelerate=truncate accelerate.tune=anchors",
        criterion="best of 20: error ≤ .9 × and spread ≥ 1.5 × those of 20 steps; below anchors alone, random anchors",
        ours="; ".join(f"{name} {errors[name]:.3f} (spread {spreads[name]:.2f})" for name in errors),
        theirs="PDMS 88.1, +3.5 over a policy from noise, with a tenth of the steps",
        differs="digits without condition instead of trajectories",
        holds=errors["trained"] <= 0.9 * errors["20 steps"]
        and spreads["trained"] >= 1.5 * spreads["20 steps"]
        and errors["trained"] < min(errors["anchors"], errors["random"]),
    )


@torch.inference_mode()
def refine_all(expert: TruncatedExpert, drafts: Latents) -> Latents:
    """Return one refined sample of every draft, without condition."""
    refiner, few_step = expert.refiner, expert.refiner.few_step or FewStepSchedule.uniform(1, "euler")
    condition = torch.full((len(drafts),), -1)
    noise = make_noise(range(len(drafts)), refiner.latent_shape)
    noised = RECTIFIED_FLOW.add_noise(drafts, noise, torch.full((len(drafts),), few_step.times[0]))
    return sample_few_step(
        lambda x, t: refiner.velocity(x, t, Condition(condition)), noised, few_step, RECTIFIED_FLOW, lambda step: noise
    )


def _joined(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


ROWS: Mapping[str, Callable[[Path], PaperRow]] = {
    "mean_flow": measure_mean_flow,
    "scm": measure_scm,
    "rcm": measure_rcm,
    "truncated_training": measure_truncated_training,
    "trained_anchors": measure_anchors,
}
