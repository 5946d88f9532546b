import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_partition.clustering import kmeans
from data_partition.clustering.kmeans import assign_nearest, choose_num_fine, choose_training_rows, fit_fine_centroids
from data_partition.errors import TooFewSamples

VALUES = np.random.default_rng(0).normal(size=(900, 5)).astype(np.float32)


@pytest.mark.parametrize(
    ("limit", "samples", "experts", "expected"), [(1024, 1000, 4, 50), (8, 1000, 4, 8), (8, 30, 4, 4), (1, 9, 9, 9)]
)
def test_number_of_fine_centroids_matches_examples(limit: int, samples: int, experts: int, expected: int):
    assert choose_num_fine(limit, samples, experts) == expected


def test_fewer_samples_than_experts_raises():
    with pytest.raises(TooFewSamples, match="3 training samples cannot be divided among 4 experts"):
        choose_num_fine(10, 3, 4)


def test_fine_centroids_depend_on_seed_alone():
    assert fit_fine_centroids(VALUES, 12, 5, 3).tobytes() == fit_fine_centroids(VALUES, 12, 5, 3).tobytes()
    assert fit_fine_centroids(VALUES, 12, 5, 3).tobytes() != fit_fine_centroids(VALUES, 12, 5, 4).tobytes()


def test_fine_centroids_recover_separated_groups():
    offsets = np.eye(5, dtype=np.float32)[np.arange(900) % 5] * 100
    centroids = fit_fine_centroids(VALUES + offsets, 5, 20, 0)
    assert sorted(centroids.argmax(axis=1).tolist()) == [0, 1, 2, 3, 4]


@given(st.integers(1, 5000), st.integers(1, 40), st.integers(0, 9))
def test_training_rows_are_bounded_distinct_and_sorted(samples: int, count: int, seed: int):
    rows = choose_training_rows(samples, count, seed)
    assert len(rows) == min(samples, count * kmeans.POINTS_PER_CENTROID)
    assert (np.diff(rows) > 0).all()
    assert rows[0] >= 0
    assert rows[-1] < samples


def test_assign_nearest_is_exact_in_every_block(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kmeans, "BLOCK_ROWS", 7)
    centroids = VALUES[:10]
    distances = np.linalg.norm(VALUES[:, None] - centroids, axis=2)
    np.testing.assert_array_equal(assign_nearest(VALUES, centroids), distances.argmin(axis=1))
