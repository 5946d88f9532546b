"""Quality of a router on held-out samples: cross-entropy, accuracy and calibration at every t.

Near t = 1 a noised sample carries no information: there the best cross-entropy is the entropy of the prior, and the
best accuracy is the largest cluster's share. Low accuracy at high t is therefore no defect.

Temperatures are fitted on one half of the held-out samples, quality is measured on the other: see `calibration_split`.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from experts.conditions.condition import Condition
from experts.training.latent_dataset import LatentDataset
from router.calibration.ece import calibration_error, calibration_error_floor
from router.calibration.temperature import apply_temperature
from router.calibration.time_bins import BINS
from router.router import Router

NOISES_PER_IMAGE = 4
"""Noise samples for every image in every bin."""
MAX_IMAGES = 2048
BLOCK = 1024
SEED = 20_250_110


@dataclass(frozen=True, slots=True, kw_only=True)
class BinQuality:
    """Quality of a router in one interval of t."""

    t_low: float
    t_high: float
    cross_entropy: float
    accuracy: float
    calibration_error: float
    """Expected calibration error of the most probable expert, in 15 cells of equal width."""
    calibration_error_floor: float
    """Average calibration error of a perfectly calibrated router with the same outputs and number of samples."""
    cross_entropy_before: float
    """Cross-entropy without temperatures."""
    calibration_error_before: float
    """Calibration error without temperatures."""
    cross_entropy_null: float
    """All `_null` values are without the condition, as in the unconditional branch of guidance."""
    accuracy_null: float
    calibration_error_null: float
    calibration_error_floor_null: float
    cross_entropy_before_null: float
    calibration_error_before_null: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Quality of a router at every t, and the limits of any router at t = 1."""

    bins: tuple[BinQuality, ...]
    images: int
    """Number of held-out images in the measurement."""
    prior_entropy: float
    """Entropy of p(k | c) in nats, averaged over the training samples, for text over the held-out ones: the floor of
    `cross_entropy` at t = 1."""
    prior_entropy_null: float
    """Entropy of p(k) in nats: the floor of `cross_entropy_null` at t = 1."""
    largest_share: float
    """Accuracy of always predicting the largest cluster of the condition: the limit of `accuracy` at t = 1."""
    largest_share_null: float
    """Share of the largest cluster: the limit of `accuracy_null` at t = 1."""
    prior_cross_entropy: float | None = None
    """Cross-entropy of p(k | text) on held-out samples, near `prior_entropy` if it is calibrated; None without text."""


def calibration_split(held_out: LatentDataset) -> tuple[LatentDataset, LatentDataset]:
    """Split held-out samples alternately: one half to measure quality, one to fit temperatures, which may be empty."""
    rows = torch.arange(len(held_out))
    return held_out.select(rows[::2]), held_out.select(rows[1::2])


@torch.no_grad()
def measure_quality(router: Router, holdout: LatentDataset, max_images: int = MAX_IMAGES) -> Quality:
    """Measure cross-entropy, accuracy and calibration in ten bins of t on held-out latents; deterministic."""
    stride = -(-len(holdout) // max_images)
    subset = holdout.select(torch.arange(0, len(holdout), stride))
    counts = router.prior_counts
    by_class = torch.cat([counts[:-1], counts[-1:] - counts[:-1].sum(0, keepdim=True)])
    quality = Quality(
        bins=tuple(_measure_bin(router, subset, index) for index in range(BINS)),
        images=len(subset),
        prior_entropy=_entropy(by_class),
        prior_entropy_null=_entropy(counts[-1:]),
        largest_share=float(by_class.amax(1).sum() / by_class.sum()),
        largest_share_null=float(counts[-1].max() / counts[-1].sum()),
    )
    return quality if router.text_prior is None else _with_text_prior(quality, router, subset)


def _with_text_prior(quality: Quality, router: Router, subset: LatentDataset) -> Quality:
    """Return the quality with the figures of p(k | text) on held-out samples in the place of those of the counts."""
    log_prior = router.prior_logits(subset.condition(torch.arange(len(subset)))).log_softmax(-1)
    probability = log_prior.exp()
    return replace(
        quality,
        prior_entropy=float(-torch.xlogy(probability, probability).sum(1).mean()),
        largest_share=float(probability.amax(1).mean()),
        prior_cross_entropy=float(functional.nll_loss(log_prior, subset.cluster_id)),
    )


def _measure_bin(router: Router, subset: LatentDataset, index: int) -> BinQuality:
    generator = torch.Generator().manual_seed(SEED + index)
    t = (index + torch.rand(NOISES_PER_IMAGE, len(subset), generator=generator)) / BINS
    noise = torch.randn(NOISES_PER_IMAGE, *subset.clean.shape, generator=generator)
    noised = torch.stack(
        [router.noise_schedule.add_noise(subset.clean, noise[draw], t[draw]) for draw in range(NOISES_PER_IMAGE)]
    )
    conditional = _measure_branch(router, noised, t, subset.condition(torch.arange(len(subset))), subset.cluster_id)
    unconditional = _measure_branch(router, noised, t, Condition.null(len(subset)), subset.cluster_id)
    null = {f"{name}_null": value for name, value in unconditional.items()}
    return BinQuality(t_low=index / BINS, t_high=(index + 1) / BINS, **conditional, **null)


def _measure_branch(
    router: Router,
    noised: Float[Tensor, "draw batch *latent"],
    t: Float[Tensor, "draw batch"],
    condition: Condition,
    cluster_id: Tensor,
) -> dict[str, float]:
    """Measure the values of `BinQuality` for one branch of guidance."""
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
    """Compute the entropy of the cluster given the condition in nats, averaged over all samples."""
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    return float(-(torch.xlogy(shares, shares).sum(1) * counts.sum(1)).sum() / counts.sum())
