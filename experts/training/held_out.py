"""Held-out loss while a network trains: the error of its velocity on samples that it never trains on, at eight fixed t.

The samples and their noise are the same at every step and for every network, so experts, monolith and ensemble are
compared by one figure. It is an unweighted error of the velocity, whatever the networks predict.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from data_partition.shards.shards import read_index
from ddm_core.artifacts import Workspace
from ddm_core.random_bits import Stream
from experts.codec import Codec
from experts.conditions.condition import Condition
from experts.conditions.text_encoder import TextEncoder
from experts.config import TrainingConfig
from experts.diffusion.noise_schedule import NoiseSchedule
from experts.training.latent_dataset import LatentDataset, LatentError, derive_seed
from experts.training.latents.folder import has_latents, read_latents
from experts.training.latents.training_set import encode_latents
from experts.training.parallel.distributed import DataParallelGroup
from experts.types import Latents, RowIds, RowTimes

HELD_OUT = "held_out"
"""Name of the mean over all t in a metrics row."""

TIMES = tuple((2 * index + 1) / 16 for index in range(8))
"""The middles of eight equal parts of [0, 1]."""

STEP_SHARE = 0.01
"""FLOPs of the measurements, at most, as a share of those of the steps."""

MAX_SAMPLES = 1024

Velocity = Callable[[Latents, RowTimes, Condition], Latents]
Measure = Callable[[nn.Module], Mapping[str, float]]
"""Maps a network to figures of a metrics row; of a group, every worker gets the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """The samples of a training, and those that it never trains on."""

    samples: LatentDataset
    held_out: LatentDataset | None = None
    times: Sequence[float] = TIMES
    """The t at which the error on held-out samples is measured."""

    @classmethod
    def open(
        cls,
        folders: Sequence[Path],
        held_out: Sequence[Path],
        codec: Codec,
        codec_folder: Path,
        workspace: Workspace,
        text: TextEncoder | None = None,
    ) -> "TrainingData":
        """Return the samples of folders of shards or latents; raises like `encode_latents`.

        Of `held_out` there may be none.
        """
        samples, unseen = encode_latents(folders, codec, codec_folder, workspace, text), None
        if any(len(read_latents(path)) if has_latents(path) else read_index(path).count for path in held_out):
            holdout_workspace = replace(workspace, scratch=workspace.scratch / "holdout")
            unseen = encode_latents(held_out, codec, codec_folder, holdout_workspace, text)
        return cls(samples=samples, held_out=unseen)

    def check_classes(self, num_classes: int) -> None:
        """Raise `LatentError` if a sample has a class that the network does not embed."""
        for latents in (self.samples, self.held_out):
            if latents is not None:
                check_classes(latents, num_classes)


def check_classes(dataset: LatentDataset, num_classes: int) -> None:
    """Raise `LatentError` if a sample has a class that the network does not embed."""
    if dataset.class_id.amax() >= num_classes:
        raise LatentError(
            f"a sample has class {int(dataset.class_id.amax())}, but there are only {num_classes} classes "
            "(counted from 0); pass the number of classes of the whole data set"
        )


def count_held_out(config: TrainingConfig) -> int:
    """Return the samples that a training measures each time, for `STEP_SHARE`; at least one.

    A step costs a forward and a backward pass of its batch, a measurement a forward pass for each sample and t.
    """
    steps = config.held_out_every or 0
    return min(MAX_SAMPLES, max(1, int(STEP_SHARE * 3 * config.batch_size * steps / len(TIMES))))


def take_evenly(dataset: LatentDataset, count: int) -> LatentDataset:
    """Return `count` samples from places spread evenly over a data set, or all if there are fewer."""
    count = min(count, len(dataset))
    return dataset.select(torch.arange(count) * len(dataset) // count)


def measure_held_out(
    velocity: Velocity,
    samples: LatentDataset,
    noise_schedule: NoiseSchedule,
    block_rows: int,
    device: torch.device,
    group: DataParallelGroup | None = None,
    at: Sequence[float] = TIMES,
) -> dict[str, float]:
    """Return the mean squared error of a velocity on `noise_schedule`, `held_out`, and `held_out_<t>` for each t.

    The t are those of `at`. At most `block_rows` rows are computed at once; a group divides them among its workers.
    """
    group = group or DataParallelGroup()
    totals = torch.zeros(len(at), device=device)
    times = torch.tensor(at)
    for samples_of_bucket in _buckets(samples):
        pairs = torch.cartesian_prod(samples_of_bucket, torch.arange(len(at)))
        pairs, count = _pad(pairs, group.size), len(pairs)
        own = torch.arange(group.rank, len(pairs), group.size)
        for numbers in torch.split(own, block_rows):
            block, counts = pairs[numbers], (numbers < count).float().to(device)
            rows, t = block[:, 0], times[block[:, 1]].to(device)
            clean = samples.clean_rows(rows).to(device)
            noise = _noise(samples, rows, clean.shape[1:]).to(device)
            with torch.no_grad():
                condition = samples.condition(rows).to(device)
                predicted = velocity(noise_schedule.add_noise(clean, noise, t), t, condition)
                error = predicted.float() - noise_schedule.velocity(clean, noise, t)
            totals.index_add_(0, block[:, 1].to(device), error.square().flatten(1).mean(1) * counts)
    means = (group.mean({"totals": totals})["totals"] * group.size / len(samples)).tolist()
    return {HELD_OUT: sum(means) / len(means)} | {
        f"{HELD_OUT}_{t:.4f}": mean for t, mean in zip(at, means, strict=True)
    }


def stopped_gaining(rows: Sequence[Mapping[str, int | float]], patience: int) -> bool:
    """Return whether none of the last `patience` measurements is below all that came before them."""
    losses = [row[HELD_OUT] for row in rows if HELD_OUT in row]
    return len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])


def _pad(pairs: Tensor, divisor: int) -> Tensor:
    """Repeat the last row until the workers get equally many, for a sharded network computes on all of them at once."""
    return torch.cat([pairs, pairs[-1:].expand(-len(pairs) % divisor, -1)])


def _buckets(samples: LatentDataset) -> list[RowIds]:
    """Return the rows of samples, those of each shape of latents together."""
    bucket_id = samples.bucket_id
    if bucket_id is None:
        return [torch.arange(len(samples))]
    return [(bucket_id == bucket).nonzero().squeeze(-1) for bucket in sorted(set(bucket_id.tolist()))]


def _noise(samples: LatentDataset, rows: RowIds, shape: torch.Size) -> Tensor:
    """Return the noise of samples, which depends on each sample alone."""
    ids = rows if samples.sample_id is None else samples.sample_id[rows]
    noise: dict[int, Tensor] = {}
    for sample_id in ids.tolist():
        if sample_id not in noise:
            generator = torch.Generator().manual_seed(derive_seed(Stream.HELD_OUT_NOISE, 0, sample_id % 2**64))
            noise[sample_id] = torch.randn(shape, generator=generator)
    return torch.stack([noise[sample_id] for sample_id in ids.tolist()])
