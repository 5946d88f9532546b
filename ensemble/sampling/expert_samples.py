"""Latents drawn from the experts, for a router that never sees the data: every expert imagines its own cluster.

Every cluster has its true share of the draws, and every class its true share of its cluster. `router/expert_samples.py`
has the format on disk.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from data_partition.partition import Partition
from ddm_core.artifacts import Preempted, Workspace
from ensemble.config import ExpertSamplesConfig
from ensemble.solvers import heun, noise_for, uniform_times
from experts.condition import NULL_CLASS, Condition
from experts.diffusion.noise_schedule import NOISE_SCHEDULES, Latents
from experts.expert import Expert, network_flops
from experts.training.latent_dataset import LatentDataset, derive_seed
from experts.training.trainer import usable_device
from router.expert_samples import ExpertSamples

DRAWS = 3
"""The purpose of these random numbers, behind those of `experts.training.latent_dataset`."""


def sample_expert_latents(
    experts: Mapping[int, Path], partition: Path, config: ExpertSamplesConfig, out: Path, workspace: Workspace
) -> float:
    """Draw from every expert that is here, write `out`, and return the FLOPs; a missing expert imagines nothing.

    Raises `Preempted` between two batches if it is asked to stop; drawing begins again.
    """
    counts = proportional_counts(partition)
    sizes = sample_counts(counts[-1], config.samples_per_expert)
    parts, flops = [], 0.0
    for k, folder in sorted(experts.items()):
        expert, classes = Expert.load(folder), sample_classes(counts[:, k], sizes[k])
        drawn = _drawn(expert, k, classes, config, workspace)
        parts.append(LatentDataset(clean=drawn, class_id=classes, cluster_id=torch.full_like(classes, k)))
        flops += expert_samples_flops(
            network_flops(expert.to("cpu").model, expert.latent_shape), sizes[k], config.steps
        )
    together = {name: torch.cat([getattr(part, name) for part in parts]) for name in _FIELDS}
    ExpertSamples(dataset=LatentDataset(**together), prior_counts=counts).save(out)
    return flops


_FIELDS = ("clean", "class_id", "cluster_id")


def proportional_counts(partition: Path) -> Float[Tensor, "condition expert"]:
    """Samples of every class in every cluster; the last row counts all of them, as `Router.prior_counts` does."""
    found = Partition.load(partition)
    classes = np.zeros((0, found.num_clusters)) if found.class_counts is None else found.class_counts
    return torch.from_numpy(np.concatenate([classes, found.counts[None]]).astype(np.float64))


def sample_counts(counts: Float[Tensor, " expert"], samples_per_expert: int) -> list[int]:
    """How many to draw from each expert: as many as asked on average, in proportion to the clusters, one at least."""
    exact = counts / counts.sum() * samples_per_expert * len(counts)
    sizes: list[int] = exact.round().clamp(min=1).long().tolist()
    return sizes


def sample_classes(counts: Float[Tensor, " condition"], size: int) -> Int[Tensor, " draw"]:
    """Classes of `size` draws from one cluster, by its counts; what no class accounts for is drawn without one."""
    by_class = torch.cat([counts[:-1], counts[-1:] - counts[:-1].sum(0, keepdim=True)])
    points = (torch.arange(size) + 0.5) / size * by_class.sum()
    found = torch.searchsorted(by_class.cumsum(0), points.double(), right=True).clamp(max=len(by_class) - 1)
    return found.masked_fill(found == len(by_class) - 1, NULL_CLASS)


def expert_samples_flops(forward: float, samples: int, steps: int) -> float:
    """FLOPs of so many draws: Heun calls the network twice a step, once in the last."""
    return forward * samples * (2 * steps - 1)


@torch.inference_mode()
def _drawn(
    expert: Expert, k: int, classes: Int[Tensor, " draw"], config: ExpertSamplesConfig, workspace: Workspace
) -> Latents:
    """Clean latents of one expert; row i depends on (seed, k, i) alone."""
    device, path = usable_device(config.device), NOISE_SCHEDULES[config.noise_schedule]
    expert, batches = expert.to(device), []
    for start in range(0, len(classes), config.batch_size):
        if workspace.stop_requested():
            raise Preempted(f"stopped after {start} of {len(classes)} draws from expert {k}; drawing begins again")
        workspace.report_progress(start, len(classes), unit=f"draws from expert {k}")
        rows = range(start, min(start + config.batch_size, len(classes)))
        condition = Condition(classes[rows.start : rows.stop]).to(device)
        noise = noise_for([derive_seed(DRAWS + k, config.seed, row) for row in rows], expert.latent_shape).to(device)

        def velocity(noised: Latents, t: Tensor, condition: Condition = condition) -> Latents:
            return expert.velocity(noised, t, condition, path)

        batches.append(heun(velocity, noise, uniform_times(config.steps)).float().cpu())
    return torch.cat(batches)
