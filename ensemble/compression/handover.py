"""The first step by an expert, the others by its student: what the first step fixes is as diverse as the expert is.

Gandikota & Bau 2025, arXiv:2503.10637. It is a schedule over t like any other, along the student's course.
"""

from ensemble.compression.acceleration.config import BaseFirstConfig
from ensemble.compression.config import StitchConfig
from ensemble.compression.method import CompressionContext, EnsembleResult, StageError
from ensemble.ensemble import ExpertModel
from ensemble.multi_network_experts import TimeSplitExpert
from experts.diffusion.few_step import FewStepSchedule
from experts.expert import Expert


def hand_over_after_base(config: BaseFirstConfig, given: CompressionContext) -> EnsembleResult:
    """The experts by turns; raises `StageError` without students of at least two steps."""
    bases = given.ensembles(whole=True)
    made = {k: split_by_time(k, student, bases[k], config) for k, student in given.ensembles().items()}
    return EnsembleResult(experts=made, modules=len(made), flops=0.0)


def split_by_time(k: int, student: ExpertModel, base: ExpertModel, config: BaseFirstConfig) -> TimeSplitExpert:
    """One expert: the base from t = 1 to the student's second time, the student from there on."""
    if not isinstance(student, Expert) or not isinstance(base, Expert) or student.few_step is None:
        raise StageError(f"base_first goes between an expert and its student, and expert {k} has none; add distill=…")
    course = student.few_step
    if len(course.times) < 2:
        raise StageError("base_first takes over a student's first step, and this one has no other; distill.steps=2")
    second = course.times[1]
    first = FewStepSchedule.uniform(config.base_steps, "euler", start=1 - second)
    times = (*(t + second for t in first.times), *course.times[1:])
    whole = FewStepSchedule(times=times, step_types=(*first.step_types, *course.step_types[1:]), is_distilled=True)
    return TimeSplitExpert(networks=(student, base), bounds=(_between(second, times),), few_step=whole)


def _between(second: float, times: tuple[float, ...]) -> float:
    """A t that is surely on the students' side of the last step of the base."""
    before = min(t for t in times if t > second)
    return (second + before) / 2


def stitch(config: StitchConfig, given: CompressionContext) -> EnsembleResult:
    """The experts by turns; `StageError` if there is no smaller ensemble, or one that is asked at few t."""
    if given.ensemble == given.original:
        raise StageError("stitch goes between a smaller ensemble and the whole one; add prune=… or quantize=…")
    few, all_ = given.experts("stitch"), given.ensembles(whole=True)
    made: dict[int, ExpertModel] = {}
    for k, small in few.items():
        full = all_[k]
        if small.few_step is not None or not isinstance(full, Expert):
            raise StageError(
                f"stitch goes between experts that are asked at any t, and expert {k} is not; after distill=… "
                "take accelerate=base_first"
            )
        networks = (small, full) if config.small == "late" else (full, small)
        made[k] = TimeSplitExpert(networks=networks, bounds=(config.t,))
    return EnsembleResult(experts=made, modules=len(made), flops=0.0)
