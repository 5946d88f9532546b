"""Experts of two networks, each on its own range of t: base-first students and stitched ensembles.

    base_first:  original expert on the first step, student on the others
    stitch:      original and compressed expert on either side of a fixed t

Gandikota & Bau 2025, arXiv:2503.10637: the first step decides how diverse samples are, so the original expert takes it.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from ensemble.compression.acceleration.config import BaseFirstConfig
from ensemble.compression.config import StitchConfig
from ensemble.compression.method import CompressionContext, EnsembleResult, StageError
from ensemble.evaluation.metrics import neighbor_radii, share_covered
from ensemble.solvers import make_noise, sample_few_step
from experts.diffusion.few_step import FewStepSchedule
from experts.expert import Expert
from experts.expert_model import ExpertModel
from experts.time_split import TimeSplitExpert
from experts.training.latent_dataset import LatentDataset

BASE_STEPS = (1, 2, 3, 4)
NEIGHBOURS = 3
ORDER_ROWS = 64
"""Samples by which the order of two networks is chosen."""


def hand_over_after_base(config: BaseFirstConfig, context: CompressionContext) -> EnsembleResult:
    """Combine every student with its original expert; raise `StageError` for students of fewer than two steps."""
    bases, students = context.load_experts(original=True), context.load_experts()
    guidance = context.sampling.guidance_scale if config.guidance is None else config.guidance
    config, notes = replace(config, guidance=guidance), tuple[str, ...]()
    if config.base_steps == "auto":
        config, note = _choose_base_steps(students, bases, config, context)
        notes = (note,)
    experts = {k: split_by_time(k, student, bases[k], config) for k, student in students.items()}
    return EnsembleResult(experts=experts, modules=len(experts), flops=0.0, notes=notes)


def _choose_base_steps(
    students: Mapping[int, ExpertModel],
    bases: Mapping[int, ExpertModel],
    config: BaseFirstConfig,
    context: CompressionContext,
) -> tuple[BaseFirstConfig, str]:
    """Return the settings with the fewest steps of enough recall, and what was tried as one line."""
    held_out = context.load_latents(sorted(students), held_out=True)
    recalls = dict[int, float]()
    for steps in BASE_STEPS:
        ratios = []
        for k, student in students.items():
            combined = split_by_time(k, student, bases[k], replace(config, base_steps=steps))
            whole = FewStepSchedule.uniform(context.sampling.steps, "euler")
            original = replace(combined, experts=(combined.experts[-1],), bounds=(), few_step=whole)
            ratios.append(
                measure_recall(combined, held_out[k], config.rows) / measure_recall(original, held_out[k], config.rows)
            )
        recalls[steps] = sum(ratios) / len(ratios)
    enough = [steps for steps, recall in recalls.items() if recall >= config.min_recall]
    chosen = min(enough) if enough else max(recalls, key=lambda steps: recalls[steps])
    table = ", ".join(f"{steps} {recall:.3f}" for steps, recall in recalls.items())
    note = f"held-out recall over the original experts' by base_steps: {table}; chosen: {chosen}"
    return replace(config, base_steps=chosen), note


@torch.inference_mode()
def measure_recall(expert: TimeSplitExpert, held_out: LatentDataset, rows: int) -> float:
    """Return the share of held-out latents within the manifold of as many samples of their conditions."""
    index = torch.arange(min(rows, len(held_out)))
    condition, few_step = held_out.condition(index), expert.few_step or FewStepSchedule.uniform(1, "euler")
    noise_schedule = expert.experts[0].noise_schedule
    samples = sample_few_step(
        lambda noised, t: expert.velocity(noised, t, condition, noise_schedule),
        make_noise(index.tolist(), expert.latent_shape),
        few_step,
        noise_schedule,
        lambda step: make_noise(index.tolist(), expert.latent_shape, 1 + step),
    )
    real, drawn = (latents.flatten(1).double().numpy() for latents in (held_out.clean_rows(index), samples))
    return share_covered(real, drawn, neighbor_radii(drawn, NEIGHBOURS))


def split_by_time(k: int, student: ExpertModel, base: ExpertModel, config: BaseFirstConfig) -> TimeSplitExpert:
    """Combine one expert: `base` from t = 1 to the student's second time, the student from there on."""
    if not isinstance(student, Expert) or not isinstance(base, Expert) or student.few_step is None:
        raise StageError(f"base_first needs a few-step student of each expert, and expert {k} has none; add distill=…")
    few_step, guidance = student.few_step, config.guidance or 1.0
    if len(few_step.times) < 2:
        raise StageError(
            f"base_first replaces a student's first step, and the student of expert {k} has only one; set "
            "distill.steps=2 or more"
        )
    second, base_steps = few_step.times[1], 1 if config.base_steps == "auto" else config.base_steps
    first = FewStepSchedule.uniform(base_steps, "euler", start=1 - second)
    times = (*(t + second for t in first.times), *few_step.times[1:])
    combined = FewStepSchedule(times=times, step_types=(*first.step_types, *few_step.step_types[1:]), is_distilled=True)
    return TimeSplitExpert(
        experts=(student, base),
        bounds=(_boundary(second, times),),
        few_step=combined,
        guidance=guidance if base.is_conditional else 1.0,
    )


def _boundary(second: float, times: tuple[float, ...]) -> float:
    """Return a t halfway between the last step of the base and the student's first, safe from rounding errors."""
    last_of_base = min(t for t in times if t > second)
    return (second + last_of_base) / 2


def stitch(config: StitchConfig, context: CompressionContext) -> EnsembleResult:
    """Combine compressed and original experts at `config.t`.

    Raises `StageError` if nothing was compressed, or if an expert cannot be evaluated at every t.
    """
    if context.ensemble == context.original:
        raise StageError("stitch needs a compressed ensemble besides the original one; add prune=… or quantize=…")
    compressed, originals = context.load_single_networks("stitch"), context.load_experts(original=True)
    pairs = dict[int, tuple[Expert, Expert]]()
    for k, small in compressed.items():
        full = originals[k]
        if small.few_step is not None or not isinstance(full, Expert):
            raise StageError(
                f"stitch needs experts that can be evaluated at any t, and expert {k} cannot; after distill=… set "
                "accelerate=base_first"
            )
        pairs[k] = (small, full)
    if config.small != "auto":
        experts = {k: stitch_by_time(*pair, config.t, is_late=config.small == "late") for k, pair in pairs.items()}
        return EnsembleResult(experts=experts, modules=len(experts), flops=0.0)
    orders = {
        k: order_by_distance(*pairs[k], config.t, context.sampling.steps, latents)
        for k, latents in context.load_latents(sorted(pairs)).items()
    }
    late, early = (sum(order[index][1] for order in orders.values()) / len(orders) for index in (0, 1))
    experts = {k: order[int(early < late)][0] for k, order in orders.items()}
    note = f"distance to the original's samples with the small network late: {late:.4f}, early: {early:.4f}"
    return EnsembleResult(
        experts=experts, modules=len(experts), flops=0.0, details={"late": late, "early": early}, notes=(note,)
    )


def stitch_by_time(small: Expert, full: Expert, t: float, *, is_late: bool) -> TimeSplitExpert:
    """Combine two networks that hand over at `t`."""
    return TimeSplitExpert(experts=(small, full) if is_late else (full, small), bounds=(t,))


@torch.inference_mode()
def order_by_distance(
    small: Expert, full: Expert, t: float, steps: int, latents: LatentDataset
) -> list[tuple[TimeSplitExpert, float]]:
    """Return both orders, the small network late and early, with the relative distance of samples to the original's.

    Both use the small network on as many of the Euler steps as are below `t`; raises `StageError` if those are all or
    none.
    """
    whole = FewStepSchedule.uniform(steps, "euler")
    count = sum(time < t for time in whole.times)
    if not 0 < count < steps:
        raise StageError(
            f"stitch.t={t:g} leaves {count} of {steps} steps below it; choose a t with steps on both sides"
        )
    index = torch.arange(min(ORDER_ROWS, len(latents)))
    condition, noise_schedule = latents.condition(index), full.noise_schedule

    def generate(expert: ExpertModel) -> torch.Tensor:
        return sample_few_step(
            lambda noised, time: expert.velocity(noised, time, condition, noise_schedule),
            make_noise(index.tolist(), full.latent_shape),
            whole,
            noise_schedule,
            lambda step: make_noise(index.tolist(), full.latent_shape, 1 + step),
        )

    exact, orders = generate(full), list[tuple[TimeSplitExpert, float]]()
    for is_late, first in ((True, steps - count), (False, count)):
        bound = (whole.times[first - 1] + whole.times[first]) / 2
        combined = stitch_by_time(small, full, bound, is_late=is_late)
        orders.append((combined, float((generate(combined) - exact).norm() / exact.norm())))
    return orders
