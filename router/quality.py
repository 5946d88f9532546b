"""How well a router knows the clusters of held-out samples, at every t.

Near t = 1 a noised sample says nothing: there the best cross-entropy is the entropy of the prior, and the
best accuracy is the largest cluster's share. Low accuracy at high t is therefore no defect.

Temperatures are fitted on one half of the held-out samples, and everything here is measured on the other: see `halves`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from experts.condition import Condition
from experts.training.latent_dataset import LatentDataset
from router.calibration.ece import calibration_error, calibration_error_floor
from router.calibration.temperature import apply_temperature
from router.calibration.time_bins import BINS
from router.router import Router

NOISES_PER_IMAGE = 4
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
    calibration_error: float
    """Expected calibration error of the most probable expert, in 15 cells of equal width."""
    calibration_error_floor: float
    """What a perfectly calibrated router that says the same has on average at this number of samples."""
    cross_entropy_before: float
    """Without temperatures."""
    calibration_error_before: float
    """Without temperatures."""
    cross_entropy_null: float
    """Without the condition, as for the unconditional branch of guidance; so are all that follow."""
    accuracy_null: float
    calibration_error_null: float
    calibration_error_floor_null: float
    cross_entropy_before_null: float
    calibration_error_before_null: float


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


def calibration_split(held_out: LatentDataset) -> tuple[LatentDataset, LatentDataset]:
    """Every other sample to measure with, and those between to fit temperatures on; the second may be empty."""
    first, second = (
        LatentDataset(
            clean=held_out.clean[start::2],
            class_id=held_out.class_id[start::2],
            cluster_id=held_out.cluster_id[start::2],
        )
        for start in (0, 1)
    )
    return first, second


@torch.no_grad()
def measure_quality(router: Router, holdout: LatentDataset) -> Quality:
    """Cross-entropy, accuracy and calibration in ten bins of t on held-out latents; the same at every call."""
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
    t = (index + torch.rand(NOISES_PER_IMAGE, len(seen), generator=generator)) / BINS
    noise = torch.randn(NOISES_PER_IMAGE, *seen.clean.shape, generator=generator)
    noised = torch.stack(
        [router.noise_schedule.add_noise(seen.clean, noise[draw], t[draw]) for draw in range(NOISES_PER_IMAGE)]
    )
    told = _figures(router, noised, t, Condition(seen.class_id), seen.cluster_id)
    untold = _figures(router, noised, t, Condition.null(len(seen)), seen.cluster_id)
    null = {f"{name}_null": value for name, value in untold.items()}
    return BinQuality(t_low=index / BINS, t_high=(index + 1) / BINS, **told, **null)


def _figures(
    router: Router,
    noised: Float[Tensor, "draw batch *latent"],
    t: Float[Tensor, "draw batch"],
    condition: Condition,
    cluster_id: Tensor,
) -> dict[str, float]:
    """The figures of `BinQuality`, of one branch."""
    blocks = [slice(start, start + BLOCK) for start in range(0, len(cluster_id), BLOCK)]
    before, after = [], []
    for draw in range(len(t)):
        for block in blocks:
            rows = condition.rows(block)
            before.append(router.uncalibrated_logits(noised[draw, block], t[draw, block], rows))
            after.append(apply_temperature(before[-1], router.temperatures, t[draw, block], rows))
    raw, logits, targets = torch.cat(before), torch.cat(after), cluster_id.repeat(len(t))
    return {
        "cross_entropy": float(functional.cross_entropy(logits, targets)),
        "accuracy": float((logits.argmax(-1) == targets).double().mean()),
        "calibration_error": calibration_error(logits.softmax(-1), targets),
        "calibration_error_floor": calibration_error_floor(logits.softmax(-1), len(t), SEED),
        "cross_entropy_before": float(functional.cross_entropy(raw, targets)),
        "calibration_error_before": calibration_error(raw.softmax(-1), targets),
    }


def _entropy(counts: Float[Tensor, "condition expert"]) -> float:
    """Entropy of the cluster given the condition in nats, averaged over all samples."""
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    return float(-(torch.xlogy(shares, shares).sum(1) * counts.sum(1)).sum() / counts.sum())
