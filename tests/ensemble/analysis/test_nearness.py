"""Calibrated nearness: the null is as it says, a copy is seen."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble.analysis.memorization import measure_memorization, near_neighbor_rate


def test_copies_are_seen():
    draws = np.random.default_rng(0)
    held_out, fresh = draws.gamma(4, size=400), draws.gamma(4, size=270)
    samples = np.concatenate([fresh, np.zeros(30)])
    found = near_neighbor_rate(samples, held_out, 0.01)
    assert found.share >= 0.1 and found.low > found.expected and found.share > found.usual and found.p_value < 1e-6


def test_without_copies_the_expected_share_is_met_and_surprises_are_as_rare_as_said():
    draws = np.random.default_rng(1)
    found = [near_neighbor_rate(draws.gamma(4, size=200), draws.gamma(4, size=99), 0.05) for _ in range(300)]
    assert np.mean([one.share for one in found]) == pytest.approx(0.05, abs=0.006) == found[0].expected
    assert np.mean([one.share > one.usual for one in found]) < 0.06
    assert np.mean([one.p_value < 0.05 for one in found]) == pytest.approx(0.045, abs=0.03)


@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.001, 0.5), st.integers(0, 99))
def test_a_share_lies_in_its_interval_and_a_scale_changes_nothing(count, known, quantile, seed):
    draws = np.random.default_rng(seed)
    samples, held_out = draws.gamma(4, size=count), draws.gamma(4, size=known)
    found, doubled = (
        near_neighbor_rate(samples, held_out, quantile),
        near_neighbor_rate(2 * samples, 2 * held_out, quantile),
    )
    assert found.low <= found.share <= found.high
    assert 1 / (known + 1) <= found.expected <= max(quantile + 0.5 / (known + 1), 1 / (known + 1)) + 1e-12
    assert (doubled.share, doubled.p_value) == (found.share, found.p_value)
    assert doubled.threshold == pytest.approx(2 * found.threshold)


@given(st.integers(1, 300), st.floats(0.001, 0.99))
def test_a_single_near_sample_is_as_probable_as_is_expected(known, quantile):
    found = near_neighbor_rate(np.zeros(1), np.arange(1.0, known + 1), quantile)
    assert found.p_value == pytest.approx(found.expected)


def test_a_duplicate_in_the_held_out_images_does_not_hide_behind_a_threshold_of_zero():
    found = near_neighbor_rate(np.zeros(5), np.zeros(20), 0.05)
    assert found.share == 0 and found.threshold == 0


def test_ratio_and_shares_are_left_out_where_there_is_nothing_to_compare():
    some, none = np.ones(3), np.empty(0)
    assert measure_memorization(some, 2 * some, (0.05,)).ratio == 0.5
    for one, other in ((some, none), (none, some)):
        found = measure_memorization(one, other, (0.05,))
        assert found.ratio is None and found.shares == ()
