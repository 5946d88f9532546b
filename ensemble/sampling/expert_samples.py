"""Sample latents from the experts to train a router without the data: each expert generates its own cluster.

Each cluster has its share of the data among the samples, and each class its share of its cluster.
`router/expert_samples.py` defines the format on disk.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from data_partition.partition import Partition
from ddm_core.artifacts import Preempted, Workspace
from ddm_core.random_bits import Stream
from ensemble.config import ExpertSamplesConfig
from ensemble.solvers import heun, make_noise, uniform_times
from experts.conditions.condition import NULL_CLASS, Condition
from experts.conditions.null_text import get_null_text
from experts.diffusion.noise_schedule import NOISE_SCHEDULES
from experts.expert import Expert, network_flops
from experts.training.latent_dataset import LatentDataset, LatentError, derive_seed
from experts.training.trainer import check_device
from experts.types import Latents
from router.expert_samples import ExpertSamples

_FIELDS = ("clean", "class_id", "cluster_id")


def sample_expert_latents(
    experts: Mapping[int, Path], partition: Path, config: ExpertSamplesConfig, out: Path, workspace: Workspace
) -> float:
    """Sample from every expert in `experts`, write `out`, and return the FLOPs.

    Raises `Preempted` between two batches on a stop request; a new attempt samples from the start.
    """
    counts = proportional_counts(partition)
    sizes = sample_counts(counts[-1], config.samples_per_expert)
    parts, flops = [], 0.0
    for k, folder in sorted(experts.items()):
        expert, classes = Expert.load(folder), sample_classes(counts[:, k], sizes[k])
        if get_null_text(expert.model) is not None:
            raise LatentError("router.data=samples draws no texts, and these experts read text; set router.data=real")
        clean = _sample_latents(expert, k, classes, config, workspace)
        parts.append(LatentDataset(clean=clean, class_id=classes, cluster_id=torch.full_like(classes, k)))
        flops += expert_samples_flops(
            network_flops(expert.to("cpu").model, expert.latent_shape), sizes[k], config.steps
        )
    clean, class_id, cluster_id = (torch.cat([getattr(part, name) for part in parts]) for name in _FIELDS)
    dataset = LatentDataset(clean=clean, class_id=class_id, cluster_id=cluster_id)
    ExpertSamples(dataset=dataset, prior_counts=counts).save(out)
    return flops


def proportional_counts(partition: Path) -> Float[Tensor, "condition expert"]:
    """Count the samples of every class in every cluster; the last row is their sum, as in `Router.prior_counts`."""
    loaded = Partition.load(partition)
    classes = np.zeros((0, loaded.num_clusters)) if loaded.class_counts is None else loaded.class_counts
    return torch.from_numpy(np.concatenate([classes, loaded.counts[None]]).astype(np.float64))


def sample_counts(counts: Float[Tensor, " expert"], samples_per_expert: int) -> list[int]:
    """Return the number of samples of each expert: proportional to its cluster, at least 1, with the requested mean."""
    exact = counts / counts.sum() * samples_per_expert * len(counts)
    sizes: list[int] = exact.round().clamp(min=1).long().tolist()
    return sizes


def sample_classes(counts: Float[Tensor, " condition"], size: int) -> Int[Tensor, " sample"]:
    """Return the classes of `size` samples of one cluster by its counts; samples without a class get the null class."""
    by_class = torch.cat([counts[:-1], counts[-1:] - counts[:-1].sum(0, keepdim=True)])
    points = (torch.arange(size) + 0.5) / size * by_class.sum()
    classes = torch.searchsorted(by_class.cumsum(0), points.double(), right=True).clamp(max=len(by_class) - 1)
    return classes.masked_fill(classes == len(by_class) - 1, NULL_CLASS)


def expert_samples_flops(forward: float, samples: int, steps: int) -> float:
    """Return the FLOPs of these samples: Heun calls the network twice a step, once in the last."""
    return forward * samples * (2 * steps - 1)


@torch.inference_mode()
def _sample_latents(
    expert: Expert, k: int, classes: Int[Tensor, " sample"], config: ExpertSamplesConfig, workspace: Workspace
) -> Latents:
    """Sample clean latents of one expert; row i depends on (seed, k, i) alone."""
    device, noise_schedule = check_device(config.device), NOISE_SCHEDULES[config.noise_schedule]
    expert, batches = expert.to(device), []
    for start in range(0, len(classes), config.batch_size):
        if workspace.stop_requested():
            raise Preempted(
                f"stopped after {start} of {len(classes)} samples of expert {k}; sampling restarts from the first"
            )
        workspace.report_progress(start, len(classes), unit=f"samples of expert {k}")
        rows = range(start, min(start + config.batch_size, len(classes)))
        condition = Condition(classes[rows.start : rows.stop]).to(device)
        noise = make_noise(
            [derive_seed(Stream.EXPERT_SAMPLES + k, config.seed, row) for row in rows], expert.latent_shape
        ).to(device)

        def velocity(noised: Latents, t: Tensor, condition: Condition = condition) -> Latents:
            return expert.velocity(noised, t, condition, noise_schedule)

        batches.append(heun(velocity, noise, uniform_times(config.steps)).float().cpu())
    return torch.cat(batches)
