import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_partition.clustering import kmeans
from data_partition.clustering.kmeans import fine_centroids, nearest, num_fine, training_rows
from data_partition.errors import TooFewSamples

VALUES = np.random.default_rng(0).normal(size=(900, 5)).astype(np.float32)


@pytest.mark.parametrize(
    ("most", "samples", "experts", "expected"), [(1024, 1000, 4, 50), (8, 1000, 4, 8), (8, 30, 4, 4), (1, 9, 9, 9)]
)
def test_how_many_fine_centroids(most: int, samples: int, experts: int, expected: int):
    assert num_fine(most, samples, experts) == expected


def test_fewer_samples_than_experts_is_an_error():
    with pytest.raises(TooFewSamples, match="3 training samples cannot be divided among 4 experts"):
        num_fine(10, 3, 4)


def test_the_same_seed_gives_the_same_bytes():
    assert fine_centroids(VALUES, 12, 5, 3).tobytes() == fine_centroids(VALUES, 12, 5, 3).tobytes()
    assert fine_centroids(VALUES, 12, 5, 3).tobytes() != fine_centroids(VALUES, 12, 5, 4).tobytes()


def test_well_separated_groups_are_found():
    places = np.eye(5, dtype=np.float32)[np.arange(900) % 5] * 100
    found = fine_centroids(VALUES + places, 5, 20, 0)
    assert sorted(found.argmax(axis=1).tolist()) == [0, 1, 2, 3, 4]


@given(st.integers(1, 5000), st.integers(1, 40), st.integers(0, 9))
def test_training_rows_are_bounded_distinct_and_sorted(samples: int, count: int, seed: int):
    rows = training_rows(samples, count, seed)
    assert len(rows) == min(samples, count * kmeans.POINTS_PER_CENTROID)
    assert (np.diff(rows) > 0).all()
    assert rows[0] >= 0
    assert rows[-1] < samples


def test_nearest_is_nearest_in_every_block(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kmeans, "BLOCK_ROWS", 7)
    centroids = VALUES[:10]
    distances = np.linalg.norm(VALUES[:, None] - centroids, axis=2)
    np.testing.assert_array_equal(nearest(VALUES, centroids), distances.argmin(axis=1))
