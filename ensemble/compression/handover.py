"""The first step by an expert, the others by its student: what the first step fixes is as diverse as the expert is.

Gandikota & Bau 2025, arXiv:2503.10637. It is a schedule over t like any other, along the student's course.
"""

from ensemble.compression.acceleration.config import BaseFirstConfig
from ensemble.compression.config import SwitchConfig
from ensemble.compression.method import Given, StageError, Together
from ensemble.ensemble import Speaker
from ensemble.multi_network_experts import ScheduledExpert
from experts.diffusion.few_step import Course
from experts.expert import Expert


def base_first(config: BaseFirstConfig, given: Given) -> Together:
    """The experts by turns; raises `StageError` without students of at least two steps."""
    bases = given.speakers(whole=True)
    made = {k: scheduled(k, student, bases[k], config) for k, student in given.speakers().items()}
    return Together(experts=made, modules=len(made), flops=0.0)


def scheduled(k: int, student: Speaker, base: Speaker, config: BaseFirstConfig) -> ScheduledExpert:
    """One expert: the base from t = 1 to the student's second time, the student from there on."""
    if not isinstance(student, Expert) or not isinstance(base, Expert) or student.course is None:
        raise StageError(f"base_first goes between an expert and its student, and expert {k} has none; add distill=…")
    course = student.course
    if len(course.times) < 2:
        raise StageError("base_first takes over a student's first step, and this one has no other; distill.steps=2")
    second = course.times[1]
    first = Course.even(config.base_steps, "euler", start=1 - second)
    times = (*(t + second for t in first.times), *course.times[1:])
    whole = Course(times=times, ways=(*first.ways, *course.ways[1:]), is_distilled=True)
    return ScheduledExpert(networks=(student, base), bounds=(_between(second, times),), course=whole)


def _between(second: float, times: tuple[float, ...]) -> float:
    """A t that is surely on the students' side of the last step of the base."""
    before = min(t for t in times if t > second)
    return (second + before) / 2


def switch(config: SwitchConfig, given: Given) -> Together:
    """The experts by turns; `StageError` if there is no smaller ensemble, or one that is asked at few t."""
    if given.ensemble == given.whole:
        raise StageError("switch goes between a smaller ensemble and the whole one; add prune=… or quantize=…")
    few, all_ = given.experts("switch"), given.speakers(whole=True)
    made: dict[int, Speaker] = {}
    for k, small in few.items():
        full = all_[k]
        if small.course is not None or not isinstance(full, Expert):
            raise StageError(
                f"switch goes between experts that are asked at any t, and expert {k} is not; after distill=… "
                "take accelerate=base_first"
            )
        networks = (small, full) if config.small == "clean" else (full, small)
        made[k] = ScheduledExpert(networks=networks, bounds=(config.t,))
    return Together(experts=made, modules=len(made), flops=0.0)
