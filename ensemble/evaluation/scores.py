"""What an evaluation finds: the numbers of one table row, and nothing that changes from run to run."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Distances:
    """How far a set of images is from the held-out ones, in one feature space."""

    fd: float
    """Fréchet distance in the held-out images' first principal components."""
    kid: float
    """Unbiased kernel distance; may be a little below zero."""
    kid_std: float
    """Standard error of `kid`."""
    precision: float
    """Share of the set that lies among the held-out images: quality."""
    recall: float
    """Share of the held-out images that lie among the set: variety."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpaceScores:
    """`Distances` of the samples; `*_floor` are those of as many real training images: nothing beats them."""

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
    def beside(cls, samples: Distances, floor: Distances) -> "SpaceScores":
        """The distances of the samples with those of real images beside them."""
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
    """Which classes the samples show. A linear probe counts both sides, so its mistakes cancel."""

    coverage: float
    """Share of the classes that reach at least half of their real share."""
    tv: float
    """Total variation of the samples' class shares from those of the held-out images."""
    tv_floor: float
    """What `tv` is expected to be for as many real images."""
    probe_accuracy: float
    """Share of the held-out images that the probe names rightly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterScores:
    """How the samples spread over the clusters of the partition."""

    tv: float
    """Total variation of the samples' shares from those of the held-out images."""
    tv_floor: float
    """What `tv` is expected to be for as many real images."""
    shares: tuple[float, ...]
    data_shares: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """One row of the table: how good, how varied and how dear the samples of a pipeline are."""

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
    """Distance to the nearest training image, over that of held-out images: well under 1 is memorising."""
    calls_per_step: float
    """Expert calls for one image in one evaluation of the velocity."""
    flops_per_image: float
    """Experts and router, over all steps of the solver."""
    flops: float
    """Counted work of the evaluation: sampling and features."""
