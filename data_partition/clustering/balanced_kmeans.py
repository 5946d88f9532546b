"""From fine centroids to clusters: k-means over weighted points, with or without a limit on a cluster's weight.

Fine centroids are few, so this is plain numpy; every step is deterministic.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int64

from data_partition.errors import EmptyCluster

RESTARTS = 8
ROUNDS = 50
TOLERANCE = 0.05
"""Maximum relative deviation of a balanced cluster from equal size, where the fine centroids allow it."""

Points = Float[np.ndarray, "fine feature"]
Means = Float[np.ndarray, "cluster feature"]
Distances = Float[np.ndarray, "fine cluster"]
Weights = Float[np.ndarray, " fine"]
Ids = Int64[np.ndarray, " fine"]


def merge_centroids(
    centroids: Points, counts: Int64[np.ndarray, " fine"], num_clusters: int, balanced: bool, seed: int
) -> Ids:
    """Merge fine centroids into clusters; return the cluster of each. A centroid's weight is its sample count.

    No cluster is empty; raises `EmptyCluster` if fewer than `num_clusters` fine centroids have a sample.
    """
    occupied = np.flatnonzero(counts)
    if len(occupied) < num_clusters:
        raise EmptyCluster(
            f"only {len(occupied)} of {len(counts)} fine centroids have a sample, too few for {num_clusters} clusters; "
            f"set partition.num_experts to at most {len(occupied)}, or remove duplicate images"
        )
    points, weights = centroids[occupied].astype(np.float64), counts[occupied].astype(np.float64)
    assign = assign_balanced if balanced else assign_to_nearest
    generator = np.random.default_rng(seed)
    candidates = [weighted_kmeans(points, weights, num_clusters, assign, generator) for _ in range(RESTARTS)]
    best = min(candidates, key=lambda ids: distortion(points, weights, ids, num_clusters))
    means = weighted_means(points, weights, best, num_clusters)
    ids: Ids = squared_distances(centroids.astype(np.float64), means).argmin(axis=1)
    ids[occupied] = best
    return ids


def weighted_kmeans(
    points: Points,
    weights: Weights,
    num_clusters: int,
    assign: Callable[[Distances, Weights], Ids],
    generator: np.random.Generator,
) -> Ids:
    """Run Lloyd's algorithm from a k-means++ start; return the best assignment of all rounds."""
    ids = assign(squared_distances(points, kmeans_plus_plus(points, weights, num_clusters, generator)), weights)
    best, least = ids, distortion(points, weights, ids, num_clusters)
    for _ in range(ROUNDS):
        distances = squared_distances(points, weighted_means(points, weights, ids, num_clusters))
        previous, ids = ids, assign(distances, weights)
        cost = distortion(points, weights, ids, num_clusters)
        if cost < least:
            best, least = ids, cost
        if np.array_equal(previous, ids):
            break
    return best


def kmeans_plus_plus(points: Points, weights: Weights, num_clusters: int, generator: np.random.Generator) -> Means:
    """Choose initial means far from each other by k-means++ (Arthur and Vassilvitskii 2007)."""
    chosen = [int(generator.choice(len(points), p=weights / weights.sum()))]
    for _ in range(num_clusters - 1):
        scores = weights * squared_distances(points, points[chosen]).min(axis=1)
        scores[chosen] = 0.0
        if scores.sum() == 0:
            scores = np.where(np.isin(np.arange(len(points)), chosen), 0.0, weights)
        chosen.append(int(generator.choice(len(points), p=scores / scores.sum())))
    return points[chosen]


def assign_to_nearest(distances: Distances, weights: Weights) -> Ids:
    """Assign every point to its nearest cluster; an empty cluster takes the point farthest from its cluster mean."""
    ids: Ids = distances.argmin(axis=1)
    sizes = np.bincount(ids, minlength=distances.shape[1])
    for empty in np.flatnonzero(sizes == 0):
        distance_to_mean = np.where(sizes[ids] > 1, distances[np.arange(len(ids)), ids], -1.0)
        moved = distance_to_mean.argmax()
        sizes[ids[moved]] -= 1
        sizes[empty] = 1
        ids[moved] = empty
    return ids


def assign_balanced(distances: Distances, weights: Weights) -> Ids:
    """Assign points to clusters of about equal weight, at a small cost in distance.

    Points with the largest regret choose first. Then points move out of the heaviest or into the lightest cluster, the
    cheapest move first. It ends when all clusters are within `TOLERANCE` or no move reduces the imbalance.
    """
    mean = weights.sum() / distances.shape[1]
    ids, loads = _assign_by_regret(distances, weights, mean)
    while (move := _next_move(ids, loads, distances, weights, mean)) is not None:
        point, cluster = move
        loads[ids[point]] -= weights[point]
        loads[cluster] += weights[point]
        ids[point] = cluster
    return ids


def _assign_by_regret(distances: Distances, weights: Weights, mean: float) -> tuple[Ids, Float[np.ndarray, " cluster"]]:
    """Assign points, largest regret first, to the nearest cluster that has room for at least half their weight.

    Regret is the extra distance to the second nearest cluster, times the weight.
    """
    preferences = distances.argsort(axis=1, kind="stable")
    nearest_two = np.sort(distances, axis=1)[:, :2]
    order = np.argsort(-(nearest_two[:, -1] - nearest_two[:, 0]) * weights, kind="stable")
    loads = np.zeros(distances.shape[1])
    ids = np.empty(len(weights), dtype=np.int64)
    for point in order:
        room = loads[preferences[point]] + weights[point] / 2 <= mean
        ids[point] = preferences[point][room.argmax()] if room.any() else loads.argmin()
        loads[ids[point]] += weights[point]
    return ids, loads


def _next_move(
    ids: Ids, loads: Float[np.ndarray, " cluster"], distances: Distances, weights: Weights, mean: float
) -> tuple[int, int] | None:
    """Return the cheapest move out of the heaviest cluster, else into the lightest one; None if all are balanced."""
    points, clusters = np.arange(len(ids)), np.arange(len(loads))
    if loads.max() > mean * (1 + TOLERANCE):
        move = _find_cheapest_move(points[ids == loads.argmax()], clusters, ids, loads, distances, weights)
        if move is not None:
            return move
    if loads.min() < mean * (1 - TOLERANCE):
        return _find_cheapest_move(points, clusters[[loads.argmin()]], ids, loads, distances, weights)
    return None


def _find_cheapest_move(
    points: Int64[np.ndarray, " candidate"],
    clusters: Int64[np.ndarray, " target"],
    ids: Ids,
    loads: Float[np.ndarray, " cluster"],
    distances: Distances,
    weights: Weights,
) -> tuple[int, int] | None:
    """Return the cheapest move of one of `points` into one of `clusters` that reduces the imbalance, else None.

    The receiving cluster must end below the previous load of the other one, so the moves terminate.
    """
    gain = loads[ids[points]][:, None] - loads[clusters] - weights[points][:, None]
    if not (gain > 0).any():
        return None
    cost = distances[np.ix_(points, clusters)] - distances[points, ids[points]][:, None]
    row, column = np.unravel_index(np.where(gain > 0, cost, np.inf).argmin(), cost.shape)
    return int(points[row]), int(clusters[column])


def weighted_means(points: Points, weights: Weights, ids: Ids, num_clusters: int) -> Means:
    """Compute the mean of each cluster, NaN for an empty one."""
    members = (ids[None, :] == np.arange(num_clusters)[:, None]) * weights
    with np.errstate(invalid="ignore"):
        means: Means = (members @ points) / members.sum(axis=1, keepdims=True)
    return means


def squared_distances(points: Points, means: Means) -> Distances:
    """Compute squared Euclidean distances, clamped to be non-negative."""
    squares = np.square(points).sum(axis=1)[:, None] + np.square(means).sum(axis=1)
    distances: Distances = np.maximum(squares - 2 * points @ means.T, 0.0)
    return distances


def distortion(points: Points, weights: Weights, ids: Ids, num_clusters: int) -> float:
    """Compute the mean squared distance of a sample's fine centroid from the mean of its cluster."""
    means = weighted_means(points, weights, ids, num_clusters)
    squares = np.square(points - means[ids]).sum(axis=1)
    return float((weights * squares).sum() / weights.sum())
