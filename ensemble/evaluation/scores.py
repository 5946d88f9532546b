"""Scores of one evaluation, the numbers of one table row; they depend on the inputs alone."""

from dataclasses import dataclass, field

from ensemble.evaluation.near_copies import NearNeighborRate


@dataclass(frozen=True, slots=True, kw_only=True)
class Distances:
    """Distances of a set of images from the held-out images, in one feature space.

    All but `fd` are None in the spaces where they do not get worse with the images: see `spaces.py`.
    """

    fd: float
    """Fréchet distance: in the held-out images' first principal components, in `pixels` over all pixels."""
    fd_std: float | None = None
    """Standard error of `fd` over draws of the set."""
    kid: float | None = None
    """Unbiased kernel distance; may be a little below zero."""
    kid_std: float | None = None
    """Standard error of `kid`."""
    precision: float | None = None
    """Share of the set within the manifold of the held-out images. Above the floor it is a sign of blur."""
    recall: float | None = None
    """Share of the held-out images within the manifold of the set: variety."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpaceScores(Distances):
    """`Distances` of the samples, and what they are to be compared with."""

    floor: Distances
    """Of as many training images, the best that can be expected."""
    codec: Distances
    """Between the same training images and the held-out images after the codec: the best that its samples can reach."""


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
class AttributeScores:
    """Shares of images to which a probe of real images gives the word of an attribute that their caption has."""

    samples: float
    real: float
    """Of the held-out images."""
    new: float | None
    """Of samples of combinations of words that were never trained on; None without such combinations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextScores:
    """How well samples follow their prompts."""

    captions: int
    """Different held-out captions, which a prompt is searched among."""
    recall: float
    """Share of the samples whose prompt is among the 20 captions nearest to what a linear map reads from the sample."""
    recall_real: float
    """The same for the held-out images and their own captions: the best that can be expected."""
    recall_chance: float
    """20 / `captions`."""
    class_accuracy: float | None
    """Share of the samples that a probe of real images assigns to the class of their prompt; None without classes."""
    class_accuracy_real: float | None
    """The same for the held-out images."""
    class_accuracy_new: float | None = None
    """The same for samples of combinations of words that were never trained on; None without such combinations."""
    attributes: dict[str, AttributeScores] = field(default_factory=dict)
    """The same for each of `scores.attributes`, among the prompts that have one of its words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """One row of the table: quality, variety and cost of the samples of a pipeline."""

    num_samples: int
    held_out: int
    """Held-out images of the comparison."""
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
    copies: NearNeighborRate
    """Samples that are nearer to a training image than almost all held-out images, in pixels: the audit's criterion."""
    calls_per_step: float
    """Expert calls for one image in one evaluation of the velocity."""
    flops_per_image: float
    """Experts and router, over all steps of the solver."""
    flops: float
    """FLOPs of the evaluation: sampling and features."""
    text: TextScores | None = None
    """How well the samples follow their prompts; None for unconditional samples, and without text."""
    held_out_loss: float | None = None
    """Mean squared error of the marginal velocity of all experts on held-out samples at eight t, as experts measure it
    while they train; None for experts that are evaluated at few t only, or start below t = 1."""
