"""The gate against replication: how much each expert copies its training images, and how well its losses tell them.

copy rate       share of its samples that are nearer to a training image than almost all held-out images are
membership AUC  probability that a held-out image of its cluster has a larger loss than a training image; .5 by chance

Both grow as clusters become small (arXiv:2301.13188 for copies, arXiv:2302.01316 for the losses), so K experts on N / K
images each replicate more than one on N.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from data_partition.features.pixels import flatten_pixels
from data_partition.partition import load_partition
from ddm_core.artifacts import write_json
from ddm_core.errors import DDMError
from ensemble.config import EvaluationConfig, ReplicationLimits
from ensemble.evaluation.near_copies import NearNeighborRate, near_neighbor_rate
from ensemble.evaluation.scoring import COPY_QUANTILE, Reference
from ensemble.pipeline import EnsemblePipeline
from experts.codec import Codec
from experts.conditions.condition import Condition
from experts.diffusion.noise_schedule import NoiseSchedule
from experts.expert_model import ExpertModel
from experts.training.held_out import TIMES, take_evenly
from experts.training.latent_dataset import LatentDataset
from experts.training.latents.folder import keeps_texts, read_latents, with_images

MAX_IMAGES = 256
"""Most training images, and most held-out images, of a cluster whose losses are compared."""
SIGNIFICANT = 1.645
"""Standard errors above the limit at which an AUC exceeds it: one case in twenty by chance."""


class ReplicationError(DDMError, ValueError):
    """An expert copies its training images more than the limits allow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertReplication:
    """Replication of one expert."""

    expert_id: int
    copies: NearNeighborRate | None
    """Of the samples that the partition assigns to its cluster; None if it has none."""
    membership_auc: float | None
    """None without held-out latents, for experts of few steps or with a cache, and where captions are kept as text."""
    membership_error: float
    """Standard error of the AUC; 0 without one."""


def check_replication(
    samples: Path,
    pipeline: Path,
    reference: Path,
    partition: Path,
    evaluation: EvaluationConfig,
    limits: ReplicationLimits,
) -> tuple[ExpertReplication, ...]:
    """Measure all experts, write `samples/replication.json`, and raise `ReplicationError` if one exceeds a limit.

    `samples` is the folder of a score, with its images.
    """
    images = np.load(samples / "images.npy", allow_pickle=False)
    loaded, opened = Reference.load(reference, evaluation), EnsemblePipeline.from_pretrained(pipeline)
    ensemble = opened.ensemble
    distances, held_out = loaded.copy_distances(flatten_pixels(images))
    clusters = load_partition(partition).assign_images(images)
    rows = []
    for k, expert in sorted(ensemble.experts.items()):
        own = distances[clusters == k]
        auc, error = _measure_membership(expert, opened.codec, partition, k, ensemble.noise_schedule)
        copies = near_neighbor_rate(own, held_out, COPY_QUANTILE) if len(own) else None
        rows.append(ExpertReplication(expert_id=k, copies=copies, membership_auc=auc, membership_error=error))
    write_json(samples / "replication.json", {"limits": limits, "experts": rows})
    if problems := [text for row in rows for text in _problems(row, limits)]:
        raise ReplicationError(
            f"{'; '.join(problems)}. Remove repeated images (data.duplicates=remove), train fewer experts or shorter, "
            "or raise the limit"
        )
    return tuple(rows)


def _problems(row: ExpertReplication, limits: ReplicationLimits) -> list[str]:
    texts = []
    if limits.max_copy_rate is not None and row.copies is not None and row.copies.low > limits.max_copy_rate:
        texts.append(
            f"{row.copies.share:.1%} of the samples of expert {row.expert_id} are near copies of training images, "
            f"certainly more than {row.copies.low:.1%}, and scores.max_copy_rate={limits.max_copy_rate:g}"
        )
    auc, limit = row.membership_auc, limits.max_membership_auc
    if limit is not None and auc is not None and auc - SIGNIFICANT * row.membership_error > limit:
        texts.append(
            f"the losses of expert {row.expert_id} tell training images from others with an AUC of {auc:.3f} ± "
            f"{row.membership_error:.3f}, and scores.max_membership_auc={limit:g}"
        )
    return texts


def _measure_membership(
    expert: ExpertModel, codec: Codec, partition: Path, k: int, noise_schedule: NoiseSchedule
) -> tuple[float | None, float]:
    """Return the AUC of an expert's losses and its error; None and 0 where it has none."""
    folders = partition / "latents" / str(k), partition / "holdout_latents" / str(k)
    if not expert.takes_any_t or not all(path.is_dir() for path in folders):
        return None, 0.0
    if any(keeps_texts(path) for path in folders):
        return None, 0.0
    members, others = (take_evenly(with_images(read_latents(path), [path], codec), MAX_IMAGES) for path in folders)
    if not len(members) or not len(others):
        return None, 0.0

    def losses(dataset: LatentDataset) -> Float[Tensor, " image"]:
        return sample_losses(
            lambda noised, t, condition: expert.velocity(noised, t, condition, noise_schedule), dataset, noise_schedule
        )

    auc = membership_auc(losses(members), losses(others))
    return auc, auc_error(auc, len(members), len(others))


@torch.inference_mode()
def sample_losses(
    velocity: Callable[[Tensor, Tensor, Condition], Tensor], dataset: LatentDataset, noise_schedule: NoiseSchedule
) -> Float[Tensor, " image"]:
    """Return the mean loss of every sample over several t, with noises that are the same in every call."""
    rows, total = torch.arange(len(dataset)), torch.zeros(len(dataset), dtype=torch.float64)
    generator, clean = torch.Generator().manual_seed(0), dataset.clean_rows(rows)
    for level in TIMES:
        t, noise = torch.full((len(dataset),), level), torch.randn(clean.shape, generator=generator)
        predicted = velocity(noise_schedule.add_noise(clean, noise, t), t, dataset.condition(rows))
        total += (predicted - noise_schedule.velocity(clean, noise, t)).double().square().flatten(1).mean(1)
    return total / len(TIMES)


def membership_auc(members: Float[Tensor, " member"], others: Float[Tensor, " other"]) -> float:
    """Return the probability that one of `others` has a larger loss than one of `members`; ties count half."""
    difference = others[:, None] - members
    return float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())


def auc_error(auc: float, members: int, others: int) -> float:
    """Return the standard error of an AUC (Hanley and McNeil 1982, doi:10.1148/radiology.143.1.7063747)."""
    first, second = auc / (2 - auc) - auc**2, 2 * auc**2 / (1 + auc) - auc**2
    return sqrt((auc * (1 - auc) + (members - 1) * first + (others - 1) * second) / (members * others))
