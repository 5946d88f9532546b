"""One stage at one place: how long, how risky, how dear; closed forms over a calibration."""

import math
from dataclasses import dataclass

from experts.config import TrainingConfig
from orchestrator.config.compute import CONTROLLER, ComputeConfig
from orchestrator.pipeline.stage import Stage
from orchestrator.planning.calibration import Calibration, Place, Work
from orchestrator.reporting.costs import price_of

NEGLIGIBLE = 1e-12
"""So few losses in a training are none."""


def preemption_probability(preemptions_per_hour: float, seconds: float) -> float:
    """How probable at least one loss is: 1 - exp(-rate * time), losses being a Poisson process."""
    return -math.expm1(-preemptions_per_hour * seconds / 3600)


def expected_seconds(work_s: float, interval_s: float, preemptions_per_hour: float, restart_s: float) -> float:
    """The expected time of a training that loses what it did since its last checkpoint, each time it is lost.

    A stretch of s seconds that begins anew whenever it is cut takes (1/rate + restart) * (exp(rate * s) - 1)
    (Daly 2006, doi:10.1016/j.future.2004.11.016, section 2); a training is one stretch after the other.
    """
    rate = preemptions_per_hour / 3600
    if rate * work_s < NEGLIGIBLE:
        return work_s
    whole = int(work_s // interval_s)
    exponents = [rate * interval_s, rate * (work_s - whole * interval_s)]
    if max(exponents) > 700:
        return math.inf
    stretches = whole * math.expm1(exponents[0]) + math.expm1(exponents[1])
    return (1 / rate + restart_s) * stretches


def best_interval_s(checkpoint_s: float, preemptions_per_hour: float) -> float:
    """The time between two checkpoints that loses least: sqrt(2 * checkpoint * mean time between losses).

    Young 1974, doi:10.1145/361147.361115, equation 2; Daly's refinement matters only if a checkpoint takes as long
    as the time between losses.
    """
    return math.sqrt(2 * checkpoint_s * 3600 / preemptions_per_hour) if preemptions_per_hour else math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a stage would take at a place."""

    seconds: float
    """Undisturbed, checkpoints included, the start of a process left out."""
    extra_s: float = 0.0
    """What losses are expected to add."""
    preemption_probability: float = 0.0
    """Of at least one loss in the undisturbed time."""
    interval_s: float | None = None
    """Between two checkpoints; None for what is no training."""
    best_interval_s: float | None = None
    """By Young's formula; None where nothing is lost."""
    price: float = 0.0
    """For the expected time, of the part of the island that the stage holds."""


def training_config(stage: Stage) -> TrainingConfig | None:
    """How a stage trains; None if it does not."""
    found = {
        "expert": lambda: stage.config.expert.training,
        "monolith": lambda: stage.config.expert.training,
        "cluster_conditioned": lambda: stage.config.expert.training,
        "distilled_monolith": lambda: stage.config.expert.training,
        "router": lambda: stage.config.training,
    }.get(stage.kind)
    training: TrainingConfig | None = found() if found else None
    return training


def stage_speed(stage: Stage) -> str:
    """The speed at which a stage trains: baselines that are trained like the monolith are as quick."""
    return "monolith" if stage.kind in ("cluster_conditioned", "distilled_monolith") else stage.kind


def estimate(stage: Stage, name: str, compute: ComputeConfig, calibration: Calibration) -> Estimate | None:
    """None where a number of images or a speed is not known."""
    place = calibration.places.get(name, Place())
    work_s = work_seconds(calibration.work[stage.name], stage, name, calibration)
    if work_s is None:
        return None
    island, training = compute.islands.get(name), training_config(stage)
    seconds, interval_s = work_s, None
    if training is not None:
        step_s = training.batch_size * place.speeds[stage_speed(stage)].unit_s / stage.resources.workers
        interval_s = training.checkpoint_every * step_s + place.checkpoint_s
        seconds += (training.steps - 1) // training.checkpoint_every * place.checkpoint_s
    if island is None:
        return Estimate(seconds=seconds, interval_s=interval_s)
    losses = island.preemptions_per_hour * stage.resources.workers
    restart_s = place.start_s + compute.backoff_s
    expected_s = expected_seconds(seconds, min(interval_s or seconds, seconds), losses, restart_s)
    return Estimate(
        seconds=seconds,
        extra_s=expected_s - seconds,
        preemption_probability=preemption_probability(losses, seconds),
        interval_s=interval_s,
        best_interval_s=best_interval_s(place.checkpoint_s, losses) if losses and training else None,
        price=price_of(island, stage.resources, expected_s),
    )


def work_seconds(work: Work, stage: Stage, name: str, calibration: Calibration) -> float | None:
    """All parts at a place's speeds, those of home for what was not measured there; workers share a training."""
    own = calibration.places.get(name, Place()).speeds
    if work.parts is None or not own:
        return None
    speeds = calibration.places[CONTROLLER].speeds | own
    total = 0.0
    for part in work.parts:
        if part.count and part.speed not in speeds:
            return None
        shared = stage.resources.workers if part.speed == stage_speed(stage) else 1
        if part.count:
            total += part.count * speeds[part.speed].unit_s / shared + speeds[part.speed].once_s
    return total
