"""What losses cost: the closed forms against their limits and against dice."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.planning.estimate import best_interval_s, expected_seconds, preemption_probability


def test_the_probability_of_a_loss():
    assert preemption_probability(0.0, 1e6) == 0.0
    assert preemption_probability(1.0, 3600) == pytest.approx(1 - math.exp(-1))
    assert preemption_probability(1e-9, 3600) == pytest.approx(1e-9)


def test_without_losses_nothing_is_added():
    assert expected_seconds(1000.0, 60.0, 0.0, 30.0) == 1000.0


def test_a_single_stretch_by_hand():
    assert expected_seconds(3600.0, 3600.0, 1.0, 0.0) == pytest.approx(3600 * (math.e - 1))
    assert expected_seconds(3600.0, 1800.0, 1.0, 0.0) == pytest.approx(2 * 3600 * (math.exp(0.5) - 1))
    assert expected_seconds(3600.0, 3600.0, 1.0, 1800.0) == pytest.approx(5400 * (math.e - 1))


def test_rare_losses_add_half_an_interval_and_a_restart_each():
    work, interval, rate, restart = 36_000.0, 600.0, 0.01, 45.0
    extra = expected_seconds(work, interval, rate, restart) - work
    assert extra == pytest.approx(work / 3600 * rate * (interval / 2 + restart), rel=0.01)


def test_what_can_never_end_takes_for_ever():
    assert expected_seconds(1e9, 1e9, 1e6, 0.0) == math.inf


@given(work=st.floats(1.0, 1e5), interval=st.floats(1.0, 1e4), rate=st.floats(0.0, 2.0), restart=st.floats(0.0, 300.0))
def test_losses_only_add_and_more_checkpoints_only_help(work, interval, rate, restart):
    expected = expected_seconds(work, interval, rate, restart)
    assert expected >= work * (1 - 1e-9)
    assert expected_seconds(work, interval / 2, rate, restart) <= expected * (1 + 1e-9)


def test_dice_agree():
    """A training of an hour, a checkpoint every ten minutes, two losses an hour, a minute to start again."""
    dice, found = random.Random(0), []
    for _ in range(20_000):
        spent, done = 0.0, 0
        while done < 6:
            life = dice.expovariate(2 / 3600)
            stretches = min(6 - done, int(life // 600))
            done += stretches
            spent += 600 * stretches if done == 6 else life + 60
        found.append(spent)
    assert expected_seconds(3600.0, 600.0, 2.0, 60.0) == pytest.approx(sum(found) / len(found), rel=0.01)


@given(checkpoint=st.floats(0.1, 5.0), rate=st.floats(0.01, 1.0))
def test_youngs_interval_is_the_best_one(checkpoint, rate):
    """Checkpoints are part of a stretch, so the work is stretched by them."""

    def expected(interval: float) -> float:
        return expected_seconds(1e6 * (interval + checkpoint) / interval, interval + checkpoint, rate, 0.0)

    best = best_interval_s(checkpoint, rate)
    assert best == pytest.approx(math.sqrt(2 * checkpoint * 3600 / rate))
    assert expected(best) <= min(expected(best * 3), expected(best / 3))


def test_without_losses_no_checkpoint_is_needed():
    assert best_interval_s(1.0, 0.0) == math.inf
