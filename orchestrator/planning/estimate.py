"""Duration, risk and price of one stage at one place: closed forms over a calibration."""

import math
from dataclasses import dataclass

from experts.config import TrainingConfig
from orchestrator.config.compute import CONTROLLER, ComputeConfig
from orchestrator.config.stage_kinds import STAGE_KINDS, TRAINING_KINDS
from orchestrator.pipeline.stage import Stage
from orchestrator.planning.calibration import Calibration, Place, Work
from orchestrator.reporting.costs import reservation_price

NEGLIGIBLE_LOSSES = 1e-12
"""Expected losses in a training below which there are none."""


def preemption_probability(preemptions_per_hour: float, seconds: float) -> float:
    """Return the probability of at least one loss: 1 - exp(-rate * time), losses being a Poisson process."""
    return -math.expm1(-preemptions_per_hour * seconds / 3600)


def expected_seconds(work_s: float, interval_s: float, preemptions_per_hour: float, restart_s: float) -> float:
    """Return the expected time of a training that loses the work since its last checkpoint at each preemption.

    A stretch of s seconds that restarts whenever it is interrupted takes (1/rate + restart) * (exp(rate * s) - 1)
    (Daly 2006, doi:10.1016/j.future.2004.11.016, section 2). A training is a sequence of such stretches.
    """
    rate = preemptions_per_hour / 3600
    if rate * work_s < NEGLIGIBLE_LOSSES:
        return work_s
    full_stretches = int(work_s // interval_s)
    exponents = [rate * interval_s, rate * (work_s - full_stretches * interval_s)]
    if max(exponents) > 700:
        return math.inf
    stretches = full_stretches * math.expm1(exponents[0]) + math.expm1(exponents[1])
    return (1 / rate + restart_s) * stretches


def best_interval_s(checkpoint_s: float, preemptions_per_hour: float) -> float:
    """Return the checkpoint interval that loses least: sqrt(2 * checkpoint time * mean time between losses).

    Young 1974, doi:10.1145/361147.361115, equation 2. Daly's refinement matters only if a checkpoint takes as long
    as the time between losses.
    """
    return math.sqrt(2 * checkpoint_s * 3600 / preemptions_per_hour) if preemptions_per_hour else math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """The expected cost of a stage at a place."""

    seconds: float
    """Without losses; checkpoints are included, the start of a process is not."""
    extra_s: float = 0.0
    """Expected additional time from losses."""
    preemption_probability: float = 0.0
    """Of at least one loss within `seconds`."""
    interval_s: float | None = None
    """Between two checkpoints; None for a stage that does not train."""
    best_interval_s: float | None = None
    """By Young's formula; None where nothing is lost."""
    price: float = 0.0
    """Price of the stage's share of the island for the expected time."""


def training_config(stage: Stage) -> TrainingConfig | None:
    """Return a stage's training configuration; None if it does not train."""
    if stage.kind not in TRAINING_KINDS:
        return None
    training: TrainingConfig = getattr(stage.config, "expert", stage.config).training
    return training


def speed_name(stage: Stage) -> str:
    """Return the speed that applies to a stage's training; other baselines train as fast as the monolith."""
    kind = STAGE_KINDS.get(stage.kind)
    return (kind.trained_as if kind else "") or stage.kind


def estimate_stage(stage: Stage, name: str, compute: ComputeConfig, calibration: Calibration) -> Estimate | None:
    """Estimate a stage at the place `name`; None if a number of images or a speed is unknown."""
    place = calibration.places.get(name, Place())
    work_s = work_seconds(calibration.work[stage.name], stage, name, calibration)
    if work_s is None:
        return None
    island, training = compute.islands.get(name), training_config(stage)
    seconds, interval_s = work_s, None
    if training is not None:
        step_s = training.batch_size * place.speeds[speed_name(stage)].unit_s / stage.resources.workers
        interval_s = training.checkpoint_every * step_s + place.checkpoint_s
        seconds += (training.steps - 1) // training.checkpoint_every * place.checkpoint_s
    if island is None:
        return Estimate(seconds=seconds, interval_s=interval_s)
    losses_per_hour = island.preemptions_per_hour * stage.resources.workers
    restart_s = place.start_s + compute.backoff_s
    expected_s = expected_seconds(seconds, min(interval_s or seconds, seconds), losses_per_hour, restart_s)
    has_best_interval = losses_per_hour and training
    return Estimate(
        seconds=seconds,
        extra_s=expected_s - seconds,
        preemption_probability=preemption_probability(losses_per_hour, seconds),
        interval_s=interval_s,
        best_interval_s=best_interval_s(place.checkpoint_s, losses_per_hour) if has_best_interval else None,
        price=reservation_price(island, stage.resources, expected_s),
    )


def work_seconds(work: Work, stage: Stage, name: str, calibration: Calibration) -> float | None:
    """Sum all parts at a place's speeds; a training is divided among its workers.

    The controller's speed replaces a speed that was not measured at the place. None if a speed is unknown.
    """
    place_speeds = calibration.places.get(name, Place()).speeds
    if work.parts is None or not place_speeds:
        return None
    speeds = calibration.places[CONTROLLER].speeds | place_speeds
    total = 0.0
    for part in work.parts:
        if part.count and part.speed not in speeds:
            return None
        workers = stage.resources.workers if part.speed == speed_name(stage) else 1
        if part.count:
            total += part.count * speeds[part.speed].unit_s / workers + speeds[part.speed].once_s
    return total
