"""How well a router knows the clusters of held-out samples, at every t.

Near t = 1 a noised sample says nothing: there the best cross-entropy is the entropy of the prior, and the
best accuracy is the largest cluster's share. Low accuracy at high t is therefore no defect.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from experts.condition import Condition
from experts.latents import LatentDataset
from router.router import Router

BINS = 10
DRAWS = 4
"""Noise draws for every image in every bin."""
MAX_IMAGES = 2048
BLOCK = 1024
SEED = 20_250_110


@dataclass(frozen=True, slots=True, kw_only=True)
class BinQuality:
    """The router between two values of t."""

    t_low: float
    t_high: float
    cross_entropy: float
    accuracy: float
    cross_entropy_null: float
    """Without the condition, as for the unconditional branch of guidance."""
    accuracy_null: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """The router at every t, and what nobody can beat at t = 1."""

    bins: tuple[BinQuality, ...]
    images: int
    """Held-out images that were looked at."""
    prior_entropy: float
    """Entropy of p(k | c) in nats, averaged over the training samples: the floor of `cross_entropy` at t = 1."""
    prior_entropy_null: float
    """Entropy of p(k) in nats: the floor of `cross_entropy_null` at t = 1."""
    largest_share: float
    """Accuracy of always naming the largest cluster of the class: the floor of `accuracy` at t = 1."""
    largest_share_null: float
    """The share of the largest cluster: the floor of `accuracy_null` at t = 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Figures:
    cross_entropy: float
    accuracy: float


@torch.no_grad()
def measure_quality(router: Router, holdout: LatentDataset) -> Quality:
    """Cross-entropy and accuracy in ten bins of t on held-out latents; the same numbers at every call."""
    stride = -(-len(holdout) // MAX_IMAGES)
    seen = LatentDataset(
        clean=holdout.clean[::stride],
        class_id=holdout.class_id[::stride],
        cluster_id=holdout.cluster_id[::stride],
    )
    counts = router.prior_counts
    by_class = torch.cat([counts[:-1], counts[-1:] - counts[:-1].sum(0, keepdim=True)])
    return Quality(
        bins=tuple(_measure_bin(router, seen, index) for index in range(BINS)),
        images=len(seen),
        prior_entropy=_entropy(by_class),
        prior_entropy_null=_entropy(counts[-1:]),
        largest_share=float(by_class.amax(1).sum() / by_class.sum()),
        largest_share_null=float(counts[-1].max() / counts[-1].sum()),
    )


def _measure_bin(router: Router, seen: LatentDataset, index: int) -> BinQuality:
    generator = torch.Generator().manual_seed(SEED + index)
    t = (index + torch.rand(DRAWS, len(seen), generator=generator)) / BINS
    noise = torch.randn(DRAWS, *seen.clean.shape, generator=generator)
    noised = torch.stack([router.path.noised(seen.clean, noise[draw], t[draw]) for draw in range(DRAWS)])
    told = _figures(router, noised, t, Condition(seen.class_id), seen.cluster_id)
    untold = _figures(router, noised, t, Condition.null(len(seen)), seen.cluster_id)
    return BinQuality(
        t_low=index / BINS,
        t_high=(index + 1) / BINS,
        cross_entropy=told.cross_entropy,
        accuracy=told.accuracy,
        cross_entropy_null=untold.cross_entropy,
        accuracy_null=untold.accuracy,
    )


def _figures(
    router: Router,
    noised: Float[Tensor, "draw batch *latent"],
    t: Float[Tensor, "draw batch"],
    condition: Condition,
    cluster_id: Tensor,
) -> _Figures:
    blocks = [slice(start, start + BLOCK) for start in range(0, len(cluster_id), BLOCK)]
    logits = torch.cat(
        [
            router.logits(noised[draw, block], t[draw, block], condition.rows(block))
            for draw in range(len(t))
            for block in blocks
        ]
    )
    targets = cluster_id.repeat(len(t))
    return _Figures(
        cross_entropy=float(functional.cross_entropy(logits, targets)),
        accuracy=float((logits.argmax(-1) == targets).double().mean()),
    )


def _entropy(counts: Float[Tensor, "condition expert"]) -> float:
    """Entropy of the cluster given the condition in nats, averaged over all samples."""
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    return float(-(torch.xlogy(shares, shares).sum(1) * counts.sum(1)).sum() / counts.sum())
