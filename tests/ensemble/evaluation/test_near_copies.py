"""Rates of near samples are calibrated, and copies are significant."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import betabinom, binomtest

from ensemble.evaluation.near_copies import compare_distances, near_neighbor_rate


def test_copies_are_significant():
    draws = np.random.default_rng(0)
    held_out, new = draws.gamma(4, size=400), draws.gamma(4, size=270)
    samples = np.concatenate([new, np.zeros(30)])
    rate = near_neighbor_rate(samples, held_out, 0.01)
    assert rate.share >= 0.1 and rate.low > rate.expected and rate.share > rate.usual and rate.p_value < 1e-6


def test_rate_without_copies_is_calibrated():
    draws = np.random.default_rng(1)
    rates = [near_neighbor_rate(draws.gamma(4, size=200), draws.gamma(4, size=99), 0.05) for _ in range(300)]
    assert np.mean([rate.share for rate in rates]) == pytest.approx(0.05, abs=0.006) == rates[0].expected
    assert np.mean([rate.share > rate.usual for rate in rates]) < 0.06
    assert np.mean([rate.p_value < 0.05 for rate in rates]) == pytest.approx(0.045, abs=0.03)


@given(st.integers(1, 300), st.integers(1, 300), st.floats(0, 1), st.floats(0.01, 0.5))
def test_figures_are_those_of_scipy_stats(count, num_held_out, near_share, quantile):
    nearer = round(near_share * count)
    held_out, samples = 1 + np.arange(num_held_out), np.where(np.arange(count) < nearer, 0, 2 + num_held_out)
    rate = near_neighbor_rate(samples.astype(float), held_out.astype(float), quantile)
    interval, rank = binomtest(nearer, count).proportion_ci(0.95), round(rate.expected * (num_held_out + 1))
    expected = betabinom(count, rank, num_held_out + 1 - rank)
    assert (rate.low, rate.high) == pytest.approx((interval.low, interval.high), abs=1e-9)
    assert rate.usual == expected.ppf(0.975) / count
    assert rate.p_value == pytest.approx(expected.sf(nearer - 1), rel=1e-6)


@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.001, 0.5), st.integers(0, 99))
def test_share_is_in_its_interval_and_scale_invariant(count, num_held_out, quantile, seed):
    draws = np.random.default_rng(seed)
    samples, held_out = draws.gamma(4, size=count), draws.gamma(4, size=num_held_out)
    rate, doubled = (
        near_neighbor_rate(samples, held_out, quantile),
        near_neighbor_rate(2 * samples, 2 * held_out, quantile),
    )
    assert rate.low <= rate.share <= rate.high
    assert (
        1 / (num_held_out + 1)
        <= rate.expected
        <= max(quantile + 0.5 / (num_held_out + 1), 1 / (num_held_out + 1)) + 1e-12
    )
    assert (doubled.share, doubled.p_value) == (rate.share, rate.p_value)
    assert doubled.threshold == pytest.approx(2 * rate.threshold)


@given(st.integers(1, 300), st.floats(0.001, 0.99))
def test_p_value_of_one_near_sample_is_the_expectation(num_held_out, quantile):
    rate = near_neighbor_rate(np.zeros(1), np.arange(1.0, num_held_out + 1), quantile)
    assert rate.p_value == pytest.approx(rate.expected)


def test_threshold_of_zero_counts_no_samples():
    rate = near_neighbor_rate(np.zeros(5), np.zeros(20), 0.05)
    assert rate.share == 0 and rate.threshold == 0


def test_comparison_without_distances_is_empty():
    distances, empty = np.ones(3), np.empty(0)
    assert compare_distances(distances, 2 * distances, (0.05,)).ratio == 0.5
    for samples, held_out in ((distances, empty), (empty, distances)):
        comparison = compare_distances(samples, held_out, (0.05,))
        assert comparison.ratio is None and comparison.shares == ()
