"""Experts of two networks, each on its own range of t: base-first students and stitched ensembles.

    base_first:  original expert on the first step, student on the others
    stitch:      original and compressed expert on either side of a fixed t

Gandikota & Bau 2025, arXiv:2503.10637: the first step decides how diverse samples are, so the original expert takes it.
"""

from ensemble.compression.acceleration.config import BaseFirstConfig
from ensemble.compression.config import StitchConfig
from ensemble.compression.method import CompressionContext, EnsembleResult, StageError
from ensemble.multi_network_experts import TimeSplitExpert
from experts.diffusion.few_step import FewStepSchedule
from experts.expert import Expert
from experts.expert_model import ExpertModel


def hand_over_after_base(config: BaseFirstConfig, context: CompressionContext) -> EnsembleResult:
    """Combine every student with its original expert; raise `StageError` for students of fewer than two steps."""
    bases = context.load_experts(original=True)
    experts = {k: split_by_time(k, student, bases[k], config) for k, student in context.load_experts().items()}
    return EnsembleResult(experts=experts, modules=len(experts), flops=0.0)


def split_by_time(k: int, student: ExpertModel, base: ExpertModel, config: BaseFirstConfig) -> TimeSplitExpert:
    """Combine one expert: `base` from t = 1 to the student's second time, the student from there on."""
    if not isinstance(student, Expert) or not isinstance(base, Expert) or student.few_step is None:
        raise StageError(f"base_first needs a few-step student of each expert, and expert {k} has none; add distill=…")
    few_step = student.few_step
    if len(few_step.times) < 2:
        raise StageError(
            f"base_first replaces a student's first step, and the student of expert {k} has only one; set "
            "distill.steps=2 or more"
        )
    second = few_step.times[1]
    first = FewStepSchedule.uniform(config.base_steps, "euler", start=1 - second)
    times = (*(t + second for t in first.times), *few_step.times[1:])
    combined = FewStepSchedule(times=times, step_types=(*first.step_types, *few_step.step_types[1:]), is_distilled=True)
    return TimeSplitExpert(experts=(student, base), bounds=(_boundary(second, times),), few_step=combined)


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
    experts: dict[int, ExpertModel] = {}
    for k, small in compressed.items():
        full = originals[k]
        if small.few_step is not None or not isinstance(full, Expert):
            raise StageError(
                f"stitch needs experts that can be evaluated at any t, and expert {k} cannot; after distill=… set "
                "accelerate=base_first"
            )
        networks = (small, full) if config.small == "late" else (full, small)
        experts[k] = TimeSplitExpert(experts=networks, bounds=(config.t,))
    return EnsembleResult(experts=experts, modules=len(experts), flops=0.0)
