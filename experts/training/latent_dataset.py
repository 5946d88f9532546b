"""Latents of one or more clusters, and the batch of each training step.

`make_batch` is a pure function of (seed, step), so order, noise,
t and dropped conditions need no state and survive any interruption.
"""

import bisect
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ddm_core.errors import DDMError
from ddm_core.random_bits import Stream, splitmix64_finalize
from experts.conditions.captions import EncodedCaptions
from experts.conditions.condition import Condition
from experts.conditions.text_embedding import TextEmbedding
from experts.config import TrainingConfig
from experts.diffusion.noise_schedule import shift_times
from experts.types import Latents, RowIds, RowTimes

NOISE_BLOCK = 2**16
"""Numbers of the noise that one generator draws, at least: fewer take less time than a generator."""


class LatentError(DDMError, ValueError):
    """Latents or their conditions cannot be trained on."""


@runtime_checkable
class ImageSource(Protocol):
    """Images that are read and encoded when a batch needs their latents: `streaming.image_stream.ImageStream`."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Return the shape of one latent."""

    def latents(self, rows: RowIds, is_flipped: Bool[Tensor, " row"] | None = None) -> Latents:
        """Return the latents of samples, of mirrored images where `is_flipped`."""

    def batch_rows(self, config: TrainingConfig, step: int) -> RowIds:
        """Return the samples of a step, and begin to read those of coming ones."""

    def reading(self, config: TrainingConfig, cache: Path) -> AbstractContextManager[None]:
        """Return a context in which images are read ahead, through a folder of bounded size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentDataset:
    """Latents with the class and the cluster of each; may be memory-mapped files."""

    clean: Latents
    """Of 16 or 32 bits; without numbers if they come from `images`. With buckets, the numbers of each latent in a row,
    and zeros after those of a smaller one."""
    class_id: Int[Tensor, " batch"]
    """-1 for samples without a class."""
    cluster_id: Int[Tensor, " batch"]
    """Index of the shard folder of the sample."""
    captions: EncodedCaptions | None = None
    """Captions of the same samples; None for data without text."""
    sample_id: Int[Tensor, " batch"] | None = None
    """Hash of the key and the content of every sample; None for latents of no images."""

    flipped: Latents | None = None
    """Of the mirrored images, like `clean`; None: none is mirrored."""
    bucket_id: Int[Tensor, " batch"] | None = None
    """Position of the shape of every latent in `shapes`; None for latents of one shape."""
    shapes: tuple[tuple[int, ...], ...] = ()
    """Shapes of the latents, that of the square images first; empty: all have one shape."""
    images: ImageSource | None = None
    """Where latents come from that are not stored."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Return the shape of one latent, with buckets that of a square image."""
        if self.images is not None:
            return self.images.latent_shape
        return self.shapes[0] if self.shapes else tuple(self.clean.shape[1:])

    def in_bucket(self, bucket: int, shapes: Sequence[tuple[int, ...]]) -> "LatentDataset":
        """Return these latents of one shape as those of a bucket."""
        width = max(map(math.prod, shapes))

        def pad(latents: Latents) -> Tensor:
            return nn.functional.pad(latents.flatten(1), (0, width - math.prod(latents.shape[1:])))

        return replace(
            self,
            clean=pad(self.clean),
            flipped=None if self.flipped is None else pad(self.flipped),
            bucket_id=torch.full_like(self.class_id, bucket),
            shapes=tuple(shapes),
        )

    def clean_rows(self, rows: RowIds, is_flipped: Bool[Tensor, " row"] | None = None) -> Latents:
        """Return latents in float32, of mirrored images where `is_flipped`; with buckets, all of the first's."""
        if self.images is not None:
            return self.images.latents(rows, None if self.flipped is None else is_flipped)
        clean = self.clean.index_select(0, rows).float()
        if is_flipped is not None and self.flipped is not None:
            clean[is_flipped] = self.flipped.index_select(0, rows[is_flipped]).float()
        if self.bucket_id is None:
            return clean
        shape = self.shapes[int(self.bucket_id[rows[0]])]
        return clean[:, : math.prod(shape)].reshape(-1, *shape)

    def reading(self, config: TrainingConfig, cache: Path) -> AbstractContextManager[None]:
        """Return a context in which images that are read when they are needed are read ahead."""
        return nullcontext() if self.images is None else self.images.reading(config, cache)

    def batch_indices(self, config: TrainingConfig, step: int) -> tuple[RowIds, RowIds | None]:
        """Return the samples of a step, all of one bucket, and the epoch of each if some are mirrored.

        See `sample_indices`, `bucket_batch` and `ShardOrder`.
        """
        batch_size, seed = config.batch_size, config.seed
        if self.bucket_id is None:
            epochs = None if self.flipped is None else batch_epochs(len(self), batch_size, step)
            if self.images is not None:
                return self.images.batch_rows(config, step), epochs
            return sample_indices(len(self), batch_size, seed, step), epochs
        counts = torch.bincount(self.bucket_id, minlength=len(self.shapes)).tolist()
        bucket, number = bucket_batch(counts, batch_size, seed, step)
        members = (self.bucket_id == bucket).nonzero().squeeze(-1)
        indices = members[sample_indices(len(members), batch_size, seed, number)]
        return indices, None if self.flipped is None else batch_epochs(len(members), batch_size, number)

    def __len__(self) -> int:
        return self.clean.shape[0]

    @property
    def null_text(self) -> TextEmbedding | None:
        """Return the encoded "", one row; None for data without text."""
        return None if self.captions is None else self.captions.null_text

    @property
    def has_conditions(self) -> bool:
        """Return whether a sample has a class or a caption."""
        return self.captions is not None or bool((self.class_id >= 0).any())

    def condition(self, rows: RowIds, uniforms: Float[Tensor, " row"] | None = None) -> Condition:
        """Return the conditions of samples; numbers in [0, 1) draw one of several captions, None takes the first."""
        class_id = self.class_id.index_select(0, rows)
        if self.captions is None:
            return Condition(class_id)
        uniforms = torch.zeros(len(rows)) if uniforms is None else uniforms
        return Condition(class_id, self.captions.gather(*self.captions.choose(rows, uniforms)))

    def select(self, rows: RowIds) -> "LatentDataset":
        """Return these samples, in this order."""
        return LatentDataset(
            clean=self.clean.index_select(0, rows) if self.images is None else self.images.latents(rows),
            class_id=self.class_id.index_select(0, rows),
            cluster_id=self.cluster_id.index_select(0, rows),
            captions=None if self.captions is None else self.captions.select(rows),
            sample_id=None if self.sample_id is None else self.sample_id.index_select(0, rows),
            flipped=None if self.flipped is None else self._flipped_rows(rows),
            bucket_id=None if self.bucket_id is None else self.bucket_id.index_select(0, rows),
            shapes=self.shapes,
        )

    def _flipped_rows(self, rows: RowIds) -> Latents:
        if self.images is not None:
            return self.images.latents(rows, torch.ones(len(rows), dtype=torch.bool))
        return torch.empty(0) if self.flipped is None else self.flipped.index_select(0, rows)

    def without_conditions(self) -> "LatentDataset":
        """Return the same latents without their classes and captions."""
        return replace(self, class_id=torch.full_like(self.class_id, -1), captions=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The input of one training step; every tensor has one row per sample."""

    clean: Latents
    noise: Latents
    t: RowTimes
    condition: Condition
    cluster_id: Int[Tensor, " batch"]
    step: int = 0
    """Of the training, counted from 0."""

    def divide(self, parts: int) -> list["Batch"]:
        """Return `parts` batches of consecutive rows, or one for every row if there are fewer; sizes differ by 1."""
        count = len(self.t)
        parts = min(parts, count)
        if parts < 2:
            return [self]
        ends = [count * part // parts for part in range(parts + 1)]
        return [self.rows(slice(*pair)) for pair in itertools.pairwise(ends)]

    def rows(self, index: slice | RowIds) -> "Batch":
        """Return these rows."""
        return Batch(
            clean=self.clean[index],
            noise=self.noise[index],
            t=self.t[index],
            condition=self.condition.rows(index),
            cluster_id=self.cluster_id[index],
            step=self.step,
        )

    def pin_memory(self) -> "Batch":
        """Return the batch in pinned memory."""
        return Batch(
            clean=self.clean.pin_memory(),
            noise=self.noise.pin_memory(),
            t=self.t.pin_memory(),
            condition=self.condition.pin_memory(),
            cluster_id=self.cluster_id.pin_memory(),
            step=self.step,
        )

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on another device."""
        if device.type == "cpu":
            return self
        return Batch(
            clean=self.clean.to(device, non_blocking=True),
            noise=self.noise.to(device, non_blocking=True),
            t=self.t.to(device, non_blocking=True),
            condition=self.condition.to(device),
            cluster_id=self.cluster_id.to(device, non_blocking=True),
            step=self.step,
        )


def make_batch(dataset: LatentDataset, config: TrainingConfig, step: int, local_rows: slice = slice(None)) -> Batch:
    """Return the batch of a step, counted from 0: a new order each epoch, logit-normal t, some conditions dropped.

    Every sample occurs once an epoch; a batch may span two epochs. t = sigmoid(mean + std * normal)
    (Esser et al. 2024, arXiv:2403.03206, section 3.1). `local_rows` selects the rows of one worker.
    """
    batch_rows, epochs = dataset.batch_indices(config, step)
    local = _taking(local_rows)
    rows = local(batch_rows)
    is_flipped = None if epochs is None else draw_flips(rows, local(epochs), config.seed)
    clean = dataset.clean_rows(rows, is_flipped)
    generator = torch.Generator().manual_seed(derive_seed(Stream.TRAINING_NOISE, config.seed, step))
    noise = draw_noise(len(batch_rows), clean.shape[1:], local_rows, config.seed, step)
    t = torch.randn(len(batch_rows), generator=generator)
    if (config.t_mean, config.t_std) != (0, 1):
        t.mul_(config.t_std).add_(config.t_mean)
    t = shift_times(t.sigmoid_(), config.t_shift)
    dropped = torch.rand(len(batch_rows), generator=generator) < config.condition_dropout
    uniforms = torch.rand(len(batch_rows), generator=generator) if dataset.captions is not None else None
    condition = dataset.condition(rows, None if uniforms is None else local(uniforms)).drop(local(dropped))
    if dataset.captions is not None:
        condition = condition.drop_one(local(torch.rand(len(batch_rows), generator=generator)))
    return Batch(
        clean=clean,
        noise=noise,
        t=local(t),
        condition=condition,
        cluster_id=dataset.cluster_id.index_select(0, rows),
        step=step,
    )


def _taking(rows: slice) -> Callable[[Tensor], Tensor]:
    """Return a function that selects these rows, without an operator for all of them."""
    return (lambda values: values) if rows == slice(None) else lambda values: values[rows]


def draw_noise(count: int, shape: Sequence[int], rows: slice, seed: int, step: int) -> Latents:
    """Return these rows of the noise of a step; other rows are not drawn, but for those that share a block with them.

    A block of rows has at least `NOISE_BLOCK` numbers and a generator of its own, so that its bits do not depend on
    which rows are asked for.
    """
    block = max(16, -(-NOISE_BLOCK // math.prod(shape)))
    start, stop, _ = rows.indices(count)
    first = start // block * block
    noise = torch.empty(min(-(-stop // block) * block, count) - first, *shape)
    for at, part in enumerate(torch.split(noise, block), start // block):
        index = (step << 32) + at
        part.normal_(generator=torch.Generator().manual_seed(derive_seed(Stream.ROW_NOISE, seed, index)))
    return noise if stop - start == len(noise) else noise[start - first : stop - first]


def sample_indices(count: int, batch_size: int, seed: int, step: int) -> Int[Tensor, " batch"]:
    """Return the samples of a step, of `count`: the next `batch_size` of the sequence of shuffled epochs."""
    parts = []
    position, end = step * batch_size, (step + 1) * batch_size
    while position < end:
        epoch, offset = divmod(position, count)
        size = min(count - offset, end - position)
        parts.append(epoch_order(count, seed, epoch)[offset : offset + size])
        position += size
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def batch_epochs(count: int, batch_size: int, step: int) -> RowIds:
    """Return the epoch of each sample of `sample_indices`."""
    return torch.arange(step * batch_size, (step + 1) * batch_size) // count


def draw_flips(samples: RowIds, epochs: RowIds, seed: int) -> Bool[Tensor, " row"]:
    """Return which samples are mirrored: half of them, by a hash of (seed, epoch, sample)."""
    keys = {epoch: derive_seed(Stream.FLIP, seed, epoch) for epoch in set(epochs.tolist())}
    key = np.array([keys[epoch] for epoch in epochs.tolist()], np.uint64)
    bits = splitmix64_finalize((key << np.uint64(32)) ^ samples.numpy().astype(np.uint64))
    return torch.from_numpy((bits & np.uint64(1)).astype(bool))


def bucket_batch(counts: Sequence[int], batch_size: int, seed: int, step: int) -> tuple[int, int]:
    """Return the bucket of a step, and which of its batches it gets, counted from 0.

    `counts` are the samples of each bucket. Its batches cut the sequence of its shuffled epochs, so that every sample
    occurs once an epoch. An epoch of the whole has the batches that end in it, in an order from (seed, epoch) alone.
    """

    def ended(epoch: int) -> list[int]:
        return [count * epoch // batch_size for count in counts]

    epoch = step * batch_size // sum(counts)
    while sum(ended(epoch + 1)) <= step:
        epoch += 1
    first, sizes = ended(epoch), [after - before for before, after in zip(ended(epoch), ended(epoch + 1), strict=True)]
    generator = torch.Generator().manual_seed(derive_seed(Stream.BUCKET_ORDER, seed, epoch))
    number = int(torch.randperm(sum(sizes), generator=generator)[step - sum(first)])
    ends = list(itertools.accumulate(sizes))
    bucket = bisect.bisect_right(ends, number)
    return bucket, first[bucket] + number - (ends[bucket] - sizes[bucket])


@functools.lru_cache(maxsize=4)
def epoch_order(count: int, seed: int, epoch: int) -> Int[Tensor, " sample"]:
    """Return a permutation of the samples that depends on (seed, epoch) only."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed(Stream.EPOCH_ORDER, seed, epoch)))


def step_seed(seed: int, step: int) -> int:
    """Return the seed of a network's own randomness at a step, such as dropout."""
    return derive_seed(Stream.TRAINING_STEP, seed, step)


def derive_seed(stream: int, seed: int, index: int) -> int:
    """Hash three numbers to 32 bits, all that torch's CPU generator uses of a seed."""
    return int(np.random.SeedSequence((stream, seed % 2**64, index)).generate_state(1)[0])
