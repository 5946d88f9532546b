"""Metrics against closed forms, brute force and real digits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.datasets import load_digits

from ensemble.evaluation import metrics
from ensemble.evaluation.metrics import (
    coverage,
    frechet_distance,
    frechet_distance_error,
    gaussian_frechet_distance,
    kernel_distance,
    neighbor_radii,
    share_covered,
    squared_distances,
    total_variation,
    total_variation_floor,
    vendi_score,
)

COUNTS = arrays(np.float64, 5, elements=st.integers(0, 1000).map(float)).filter(lambda counts: counts.sum() > 0)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def precision_recall(samples, real, neighbors=3):
    """Return precision and recall as the scores compute them."""
    return (
        share_covered(samples, real, neighbor_radii(real, neighbors)),
        share_covered(real, samples, neighbor_radii(samples, neighbors)),
    )


def kid(first, second):
    return kernel_distance(first, second)[0]


def random_covariance(rng, size):
    factor = rng.normal(size=(size, size))
    return factor @ factor.T


# Fréchet distance


@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 12), st.integers(0, 99))
def test_frechet_by_rows_equals_frechet_by_covariances(rows, others, size, seed):
    draws = np.random.default_rng(seed)
    first, second = draws.normal(size=(rows, size)), draws.normal(1, 2, size=(others, size))
    moments = [(values.mean(0), np.atleast_2d(np.cov(values, rowvar=False))) for values in (first, second)]
    expected = gaussian_frechet_distance(*moments[0], *moments[1])
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_frechet_error_predicts_the_spread(rng):
    second = rng.normal(size=(300, 4))
    draws = [rng.normal(0.5, 1, size=(300, 4)) for _ in range(60)]
    spread = np.std([frechet_distance(first, second) for first in draws])
    predicted = np.mean([frechet_distance_error(first, second) for first in draws[:20]])
    assert 0.7 < predicted / spread < 1.5


def test_frechet_of_commuting_covariances_has_closed_form(rng):
    axes = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    first, second = np.array([4.0, 1.0, 9.0, 0.0]), np.array([1.0, 1.0, 16.0, 4.0])
    means = rng.normal(size=(2, 4))
    distance = gaussian_frechet_distance(means[0], (axes * first) @ axes.T, means[1], (axes * second) @ axes.T)
    by_hand = 1 + 0 + 1 + 4  # squared differences of the standard deviations
    assert distance == pytest.approx(np.square(means[0] - means[1]).sum() + by_hand)


def test_frechet_in_one_dimension():
    first = np.array([[1.0], [3.0]])  # mean 2, variance 2
    second = np.array([[0.0], [4.0], [8.0]])  # mean 4, variance 16
    assert frechet_distance(first, second) == pytest.approx(4 + (4 - np.sqrt(2)) ** 2)


def test_frechet_agrees_with_the_matrix_square_root(rng):
    first, second = random_covariance(rng, 5), random_covariance(rng, 5)
    eigenvalues = np.linalg.eigvals(first @ second)
    expected = np.trace(first) + np.trace(second) - 2 * np.sqrt(eigenvalues.real).sum()
    assert gaussian_frechet_distance(np.zeros(5), first, np.zeros(5), second) == pytest.approx(expected)


def test_frechet_is_symmetric_and_zero_on_equal_sets(rng):
    first, second = rng.normal(size=(50, 6)), rng.normal(1, 2, size=(40, 6))
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first))
    assert frechet_distance(first, first[::-1]) == pytest.approx(0, abs=1e-6)


def test_frechet_of_a_shift_is_its_squared_length(rng):
    rows = rng.normal(size=(30, 3))
    assert frechet_distance(rows, rows + np.array([1.0, 2.0, 2.0])) == pytest.approx(9)


# Kernel distance


def test_kernel_distance_equals_a_double_loop(rng):
    first, second = rng.normal(size=(5, 3)), rng.normal(size=(4, 3))

    def kernel(a, b):
        return (a @ b / 3 + 1) ** 3

    def within(rows):
        pairs = [kernel(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
        return sum(pairs) / len(pairs)

    between = sum(kernel(a, b) for a in first for b in second) / 20
    assert kid(first, second) == pytest.approx(within(first) + within(second) - 2 * between)


def test_kernel_distance_does_not_depend_on_the_blocks(rng, monkeypatch):
    first, second = rng.normal(size=(37, 8)), rng.normal(size=(23, 8))
    expected = kid(first, second)
    monkeypatch.setattr(metrics, "BLOCK_ROWS", 5)
    assert kid(first, second) == pytest.approx(expected)


def test_kernel_distance_is_unbiased(rng):
    draws = [kid(rng.normal(size=(20, 4)), rng.normal(size=(15, 4))) for _ in range(400)]
    assert abs(np.mean(draws)) < 3 * np.std(draws) / np.sqrt(len(draws))
    assert min(draws) < 0


def test_kernel_distance_ignores_the_order(rng):
    first, second = rng.normal(size=(30, 4)), rng.normal(1, 1, size=(25, 4))
    assert kid(rng.permutation(first), second[::-1]) == pytest.approx(kid(first, second))


def test_kernel_error_predicts_the_spread(rng):
    def draw():
        return rng.normal(size=(200, 4)), rng.normal(0.5, 1, size=(200, 4))

    spread = np.std([kid(*draw()) for _ in range(60)])
    predicted = np.mean([kernel_distance(*draw())[1] for _ in range(20)])
    assert 0.6 < predicted / spread < 1.7


def test_kernel_distance_of_a_single_row_raises():
    with pytest.raises(ValueError, match="generate more samples"):
        kid(np.zeros((1, 2)), np.zeros((5, 2)))


# Precision and recall


def test_identical_sets_have_precision_and_recall_one(rng):
    rows = rng.normal(size=(50, 6)).astype(np.float32)
    assert precision_recall(rows, rng.permutation(rows)) == (1, 1)


def test_sets_of_duplicates_have_precision_and_recall_one(rng):
    rows = np.repeat(rng.normal(size=(5, 600)), 8, axis=0)
    assert precision_recall(rows, rows[::-1]) == (1, 1)


def test_disjoint_sets_have_precision_and_recall_zero(rng):
    rows = rng.normal(size=(50, 6))
    assert precision_recall(rows, rows + 100) == (0, 0)


def test_half_of_the_modes_has_half_the_recall(rng):
    near, far = rng.normal(size=(40, 3)), rng.normal(size=(40, 3)) + 100
    precision, recall = precision_recall(near, np.concatenate([near, far]))
    assert (precision, recall) == (1, 0.5)


def test_radius_reaches_the_kth_other_row():
    line = np.array([[0.0], [1.0], [3.0], [7.0]])
    assert neighbor_radii(line, 1).tolist() == [1, 1, 4, 16]
    assert neighbor_radii(line, 2).tolist() == [9, 4, 9, 36]
    assert share_covered(np.array([[-1.0], [-2.0], [11.0], [12.0]]), line, neighbor_radii(line, 1)) == 0.5


def test_too_few_rows_for_the_neighbors_raises():
    with pytest.raises(ValueError, match="more than 3 rows, not 3"):
        neighbor_radii(np.zeros((3, 2)), 3)


# Shares


@given(COUNTS, COUNTS)
def test_total_variation_is_a_bounded_metric(first, second):
    distance = total_variation(first, second)
    assert 0 <= distance <= 1 + 1e-12
    assert distance == total_variation(second, first)
    assert total_variation(first, first) == 0
    assert total_variation(7 * first, second) == pytest.approx(distance, abs=1e-12)


@given(COUNTS, COUNTS, COUNTS)
def test_total_variation_obeys_the_triangle(first, second, third):
    direct = total_variation(first, third)
    assert direct <= total_variation(first, second) + total_variation(second, third) + 1e-12


def test_total_variation_of_small_counts():
    assert total_variation(np.array([1.0, 1.0, 0.0]), np.array([0.0, 1.0, 1.0])) == 0.5
    assert total_variation(np.array([3.0, 0.0]), np.array([0.0, 8.0])) == 1


def test_total_variation_floor_is_that_of_fair_draws(rng):
    share = np.array([0.5, 0.3, 0.15, 0.05])
    draws = rng.multinomial(400, share, size=(2000, 2)).astype(np.float64)
    mean = np.mean([total_variation(first, second) for first, second in draws])
    assert total_variation_floor(400 * share, 400) == pytest.approx(mean, rel=0.05)


def test_shares_of_zero_counts_raise():
    with pytest.raises(ValueError, match="not all 0"):
        total_variation(np.zeros(3), np.ones(3))


def test_coverage_counts_classes_with_half_their_share():
    real = np.array([10.0, 10.0, 10.0, 10.0, 0.0])
    assert coverage(np.array([70.0, 13.0, 12.0, 0.0, 5.0]), real) == 0.5  # 13 % of 25 % is enough, 12 % is not


@given(
    arrays(np.float64, (7, 3), elements=st.floats(-10, 10)),
    arrays(np.float64, (4, 3), elements=st.floats(-10, 10)),
)
def test_distances_equal_the_definition(first, second):
    expected = np.square(first[:, None] - second[None]).sum(-1)
    np.testing.assert_allclose(np.concatenate(list(squared_distances(first, second))), expected, atol=1e-9)


# Directions on real images


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    rows = images / np.linalg.norm(images, axis=1, keepdims=True) * np.sqrt(images.shape[1])
    order = np.random.default_rng(0).permutation(len(rows))
    return rows[order[:800]], labels[order[:800]], rows[order[800:1600]], labels[order[800:1600]]


def test_missing_classes_worsen_every_metric(digits):
    real, real_labels, other, other_labels = digits
    reduced = other[other_labels >= 3]
    assert precision_recall(reduced, real)[1] < precision_recall(other, real)[1] - 0.1
    assert precision_recall(reduced, real)[0] == pytest.approx(precision_recall(other, real)[0], abs=0.05)
    assert kid(reduced, real) > 3 * abs(kid(other, real))
    assert frechet_distance(reduced, real) > frechet_distance(other, real)

    counts = [np.bincount(labels, minlength=10).astype(np.float64) for labels in (other_labels, real_labels)]
    reduced_counts = np.bincount(other_labels[other_labels >= 3], minlength=10).astype(np.float64)
    assert coverage(counts[0], counts[1]) == 1
    assert coverage(reduced_counts, counts[1]) == pytest.approx(0.7)
    assert total_variation(reduced_counts, counts[1]) > total_variation(counts[0], counts[1])


def test_more_noise_is_worse(digits):
    real, _, other, _ = digits
    noise = np.random.default_rng(1).normal(size=other.shape)
    levels = [other + scale * noise for scale in (0.0, 0.3, 1.0)]
    assert np.all(np.diff([kid(rows, real) for rows in levels]) > 0)
    assert np.all(np.diff([frechet_distance(rows, real) for rows in levels]) > 0)
    assert np.all(np.diff([precision_recall(rows, real)[0] for rows in levels]) < 0)


@given(st.integers(2, 12), st.integers(1, 4))
def test_vendi_score_counts_dissimilar_rows(kinds, copies):
    rows = np.repeat(np.eye(kinds), copies, axis=0)
    assert vendi_score(rows) == pytest.approx(kinds)
    assert vendi_score(5 * rows) == pytest.approx(kinds), "sizes do not matter"
    assert vendi_score(np.ones((kinds, 3))) == pytest.approx(1)
    wide = np.concatenate([rows, np.zeros((len(rows), 50))], axis=1)
    assert vendi_score(wide) == pytest.approx(kinds), "more features than rows"
