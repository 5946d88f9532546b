"""Scores of one evaluation, the numbers of one table row; they depend on the inputs alone."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Distances:
    """Distances of a set of images from the held-out images, in one feature space."""

    fd: float
    """Fréchet distance in the held-out images' first principal components."""
    kid: float
    """Unbiased kernel distance; may be a little below zero."""
    kid_std: float
    """Standard error of `kid`."""
    precision: float
    """Share of the set within the manifold of the held-out images: quality."""
    recall: float
    """Share of the held-out images within the manifold of the set: variety."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpaceScores:
    """`Distances` of the samples; `*_floor` are those of as many training images, the best that can be expected."""

    fd: float
    fd_floor: float
    kid: float
    kid_floor: float
    kid_std: float
    precision: float
    precision_floor: float
    recall: float
    recall_floor: float

    @classmethod
    def with_floor(cls, samples: Distances, floor: Distances) -> "SpaceScores":
        """Combine the distances of the samples with those of real images."""
        return cls(
            fd=samples.fd,
            fd_floor=floor.fd,
            kid=samples.kid,
            kid_floor=floor.kid,
            kid_std=samples.kid_std,
            precision=samples.precision,
            precision_floor=floor.precision,
            recall=samples.recall,
            recall_floor=floor.recall,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassScores:
    """Distribution of the samples over classes. A linear probe counts both sides, so its errors cancel."""

    coverage: float
    """Share of the classes that reach at least half of their real share."""
    tv: float
    """Total variation of the samples' class shares from those of the held-out images."""
    tv_floor: float
    """Expected `tv` of as many real images."""
    probe_accuracy: float
    """Accuracy of the probe on the held-out images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterScores:
    """Distribution of the samples over the clusters of the partition."""

    tv: float
    """Total variation of the samples' shares from those of the held-out images."""
    tv_floor: float
    """Expected `tv` of as many real images."""
    shares: tuple[float, ...]
    data_shares: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """One row of the table: quality, variety and cost of the samples of a pipeline."""

    num_samples: int
    selection: str
    spaces: dict[str, SpaceScores]
    class_coverage: float | None
    """The class scores are None where the data have no labels; see `ClassScores`."""
    class_tv: float | None
    class_tv_floor: float | None
    probe_accuracy: float | None
    cluster_share_tv: float
    """The cluster scores are those of `ClusterScores`."""
    cluster_share_tv_floor: float
    cluster_shares: tuple[float, ...]
    cluster_shares_data: tuple[float, ...]
    nn_ratio: float
    """Distance to the nearest training image over that of held-out images: well below 1 is memorization."""
    calls_per_step: float
    """Expert calls for one image in one evaluation of the velocity."""
    flops_per_image: float
    """Experts and router, over all steps of the solver."""
    flops: float
    """FLOPs of the evaluation: sampling and features."""
