"""What machines that may vanish add to a training: closed forms, in seconds."""

import math

NEGLIGIBLE = 1e-12
"""So few losses in a training are none."""


def loss_probability(losses_per_hour: float, seconds: float) -> float:
    """How probable at least one loss is: 1 - exp(-rate * time), losses being a Poisson process."""
    return -math.expm1(-losses_per_hour * seconds / 3600)


def expected_seconds(work_s: float, interval_s: float, losses_per_hour: float, restart_s: float) -> float:
    """The expected time of a training that loses what it did since its last checkpoint, each time it is lost.

    A stretch of s seconds that begins anew whenever it is cut takes (1/rate + restart) * (exp(rate * s) - 1)
    (Daly 2006, doi:10.1016/j.future.2004.11.016, section 2); a training is one stretch after the other.
    """
    rate = losses_per_hour / 3600
    if rate * work_s < NEGLIGIBLE:
        return work_s
    whole = int(work_s // interval_s)
    exponents = [rate * interval_s, rate * (work_s - whole * interval_s)]
    if max(exponents) > 700:
        return math.inf
    stretches = whole * math.expm1(exponents[0]) + math.expm1(exponents[1])
    return (1 / rate + restart_s) * stretches


def best_interval_s(checkpoint_s: float, losses_per_hour: float) -> float:
    """The time between two checkpoints that loses least: sqrt(2 * checkpoint * mean time between losses).

    Young 1974, doi:10.1145/361147.361115, equation 2; Daly's refinement matters only if a checkpoint takes as long
    as the time between losses.
    """
    return math.sqrt(2 * checkpoint_s * 3600 / losses_per_hour) if losses_per_hour else math.inf
