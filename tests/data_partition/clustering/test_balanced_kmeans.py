import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_partition.clustering.balanced_kmeans import (
    TOLERANCE,
    assign_balanced,
    distortion,
    merge_centroids,
    squared_distances,
)
from data_partition.errors import EmptyCluster


def points(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3)).astype(np.float32)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(1, 8), st.booleans(), st.integers(0, 99), st.integers(1, 500))
def test_merge_centroids_leaves_no_empty_cluster(fine: int, clusters: int, balanced: bool, seed: int, heaviest: int):
    clusters = min(clusters, fine)
    counts = np.random.default_rng(seed).integers(1, heaviest + 1, fine)
    ids = merge_centroids(points(fine, seed), counts, clusters, balanced, seed)
    assert set(ids.tolist()) == set(range(clusters))


@settings(max_examples=5, deadline=None)
@given(st.integers(2, 6), st.integers(0, 99))
def test_balanced_merge_of_light_points_meets_tolerance(clusters: int, seed: int):
    counts = np.random.default_rng(seed).integers(20, 60, 60 * clusters)
    ids = merge_centroids(points(len(counts), seed), counts, clusters, True, seed)
    loads = np.bincount(ids, counts)
    assert np.abs(loads / loads.mean() - 1).max() <= TOLERANCE


def test_balanced_merge_has_higher_distortion_than_plain():
    skewed = np.concatenate([points(160, 0) * 0.1, points(40, 1) * 0.1 + 5])
    counts = np.full(200, 10)
    plain, balanced = (merge_centroids(skewed, counts, 2, choice, 0) for choice in (False, True))
    assert sorted(np.bincount(plain).tolist()) == [40, 160]
    assert sorted(np.bincount(balanced).tolist()) == pytest.approx([100, 100], abs=5)
    weights = counts.astype(float)
    assert distortion(skewed, weights, plain, 2) < distortion(skewed, weights, balanced, 2)


def test_merge_centroids_respects_weights():
    line = np.array([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]], dtype=np.float32)
    ids = merge_centroids(line, np.array([3, 1, 2]), 2, True, 0)
    assert ids[0] != ids[2] == ids[1]


def test_heavy_point_does_not_empty_a_cluster():
    distances = np.array([[0.0, 9.0, 9.0], [9.0, 0.0, 9.0], [9.0, 0.0, 9.0]])
    ids = assign_balanced(distances, np.array([100.0, 1.0, 1.0]))
    assert sorted(ids.tolist()) == [0, 1, 2]


def test_empty_fine_centroid_joins_nearest_cluster():
    line = np.array([[0.0], [10.0], [1.0]], dtype=np.float32)
    ids = merge_centroids(line, np.array([5, 5, 0]), 2, True, 0)
    assert ids[2] == ids[0] != ids[1]


def test_too_few_occupied_centroids_raises():
    with pytest.raises(EmptyCluster, match="only 2 of 3 fine centroids.*num_experts to at most 2"):
        merge_centroids(points(3, 0), np.array([1, 0, 1]), 3, True, 0)


def test_merge_centroids_is_deterministic_under_seed():
    counts = np.full(60, 4)
    first, second = (merge_centroids(points(60, 0), counts, 4, True, 7) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_squared_distances_match_example():
    distances = squared_distances(np.array([[0.0, 0.0], [3.0, 4.0]]), np.array([[0.0, 0.0], [3.0, 0.0]]))
    np.testing.assert_allclose(distances, [[0, 9], [25, 16]])


@pytest.mark.filterwarnings("error")
def test_empty_cluster_does_not_count():
    points, weights, ids = np.eye(3), np.ones(3), np.zeros(3, np.int64)
    assert distortion(points, weights, ids, 2) == distortion(points, weights, ids, 1)
