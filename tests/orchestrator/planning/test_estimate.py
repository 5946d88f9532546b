"""The cost of losses: the closed forms against their limits and against a simulation."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.planning.estimate import best_interval_s, expected_seconds, preemption_probability


def test_preemption_probability_is_exponential():
    assert preemption_probability(0.0, 1e6) == 0.0
    assert preemption_probability(1.0, 3600) == pytest.approx(1 - math.exp(-1))
    assert preemption_probability(1e-9, 3600) == pytest.approx(1e-9)


def test_time_without_losses_equals_the_work():
    assert expected_seconds(1000.0, 60.0, 0.0, 30.0) == 1000.0


def test_single_stretch_equals_hand_calculation():
    assert expected_seconds(3600.0, 3600.0, 1.0, 0.0) == pytest.approx(3600 * (math.e - 1))
    assert expected_seconds(3600.0, 1800.0, 1.0, 0.0) == pytest.approx(2 * 3600 * (math.exp(0.5) - 1))
    assert expected_seconds(3600.0, 3600.0, 1.0, 1800.0) == pytest.approx(5400 * (math.e - 1))


def test_rare_losses_add_half_an_interval_and_a_restart():
    work, interval, rate, restart = 36_000.0, 600.0, 0.01, 45.0
    extra = expected_seconds(work, interval, rate, restart) - work
    assert extra == pytest.approx(work / 3600 * rate * (interval / 2 + restart), rel=0.01)


def test_training_that_cannot_end_takes_infinite_time():
    assert expected_seconds(1e9, 1e9, 1e6, 0.0) == math.inf


@given(work=st.floats(1.0, 1e5), interval=st.floats(1.0, 1e4), rate=st.floats(0.0, 2.0), restart=st.floats(0.0, 300.0))
def test_losses_add_time_and_checkpoints_reduce_it(work, interval, rate, restart):
    expected = expected_seconds(work, interval, rate, restart)
    assert expected >= work * (1 - 1e-9)
    assert expected_seconds(work, interval / 2, rate, restart) <= expected * (1 + 1e-9)


def test_expected_time_equals_simulated_mean():
    """An hour of training, a checkpoint every ten minutes, two losses per hour, one minute per restart."""
    rng, totals = random.Random(0), []
    for _ in range(20_000):
        spent, done = 0.0, 0
        while done < 6:
            life = rng.expovariate(2 / 3600)
            stretches = min(6 - done, int(life // 600))
            done += stretches
            spent += 600 * stretches if done == 6 else life + 60
        totals.append(spent)
    assert expected_seconds(3600.0, 600.0, 2.0, 60.0) == pytest.approx(sum(totals) / len(totals), rel=0.01)


@given(checkpoint=st.floats(0.1, 5.0), rate=st.floats(0.01, 1.0))
def test_youngs_interval_is_optimal(checkpoint, rate):
    """Checkpoints are part of a stretch, so they lengthen the work."""

    def expected(interval: float) -> float:
        return expected_seconds(1e6 * (interval + checkpoint) / interval, interval + checkpoint, rate, 0.0)

    best = best_interval_s(checkpoint, rate)
    assert best == pytest.approx(math.sqrt(2 * checkpoint * 3600 / rate))
    assert expected(best) <= min(expected(best * 3), expected(best / 3))


def test_best_interval_without_losses_is_infinite():
    assert best_interval_s(1.0, 0.0) == math.inf
