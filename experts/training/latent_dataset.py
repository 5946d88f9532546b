"""Latents of one or more clusters, and the batch of each training step.

`encode_latents` runs the codec once over all shards. `make_batch` is a pure function of (seed, step), so order, noise,
t and dropped conditions need no state and survive any interruption.
"""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from data_partition.shards.shards import read_batches, read_index
from ddm_core.artifacts import (
    CACHE,
    CorruptArtifact,
    Preempted,
    Workspace,
    atomic_folder,
    checksum,
    list_files,
    read_with_checksum,
    to_jsonable,
    write_record,
)
from ddm_core.errors import DDMError
from ddm_core.memmaps import create_memmap
from ddm_core.random_bits import Stream
from experts.codec import Codec
from experts.conditions.captions import EncodedCaptions
from experts.conditions.condition import Condition
from experts.conditions.text_embedding import TextEmbedding
from experts.config import TrainingConfig
from experts.training.distributed import DataParallelGroup
from experts.types import Latents, RowIds, RowTimes

logger = logging.getLogger(__name__)

ENCODE_BATCH = 512


class LatentError(DDMError, ValueError):
    """Latents or their conditions cannot be trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentDataset:
    """Latents with the class and the cluster of each; may be memory-mapped files."""

    clean: Latents
    class_id: Int[Tensor, " batch"]
    """-1 for samples without a class."""
    cluster_id: Int[Tensor, " batch"]
    """Index of the shard folder of the sample."""
    captions: EncodedCaptions | None = None
    """Captions of the same samples; None for data without text."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Return the shape of one latent."""
        return tuple(self.clean.shape[1:])

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
            clean=self.clean.index_select(0, rows),
            class_id=self.class_id.index_select(0, rows),
            cluster_id=self.cluster_id.index_select(0, rows),
            captions=None if self.captions is None else self.captions.select(rows),
        )

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
        )


def make_batch(dataset: LatentDataset, config: TrainingConfig, step: int, local_rows: slice = slice(None)) -> Batch:
    """Return the batch of a step, counted from 0: a new order each epoch, logit-normal t, some conditions dropped.

    Every sample occurs once an epoch; a batch may span two epochs. t = sigmoid(mean + std * normal)
    (Esser et al. 2024, arXiv:2403.03206, section 3.1). `local_rows` selects the rows of one worker.
    """
    batch_rows = sample_indices(len(dataset), config.batch_size, config.seed, step)
    rows = batch_rows[local_rows]
    generator = torch.Generator().manual_seed(derive_seed(Stream.TRAINING_NOISE, config.seed, step))
    noise = torch.randn(len(batch_rows), *dataset.latent_shape, generator=generator)
    t = torch.randn(len(batch_rows), generator=generator).mul_(config.t_std).add_(config.t_mean).sigmoid_()
    dropped = torch.rand(len(batch_rows), generator=generator) < config.condition_dropout
    uniforms = torch.rand(len(batch_rows), generator=generator) if dataset.captions is not None else None
    condition = dataset.condition(rows, None if uniforms is None else uniforms[local_rows])
    return Batch(
        clean=dataset.clean.index_select(0, rows),
        noise=noise[local_rows],
        t=t[local_rows],
        condition=condition.drop(dropped[local_rows]),
        cluster_id=dataset.cluster_id.index_select(0, rows),
    )


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


def encode_latents(shards: Sequence[Path], codec: Codec, codec_folder: Path, workspace: Workspace) -> LatentDataset:
    """Encode every sample of the shard folders once; later attempts reuse the latents in the scratch folder.

    Reused latents are compared with their checksums first: the disk may have changed a bit since they were written.

    Raises `Preempted` if the workspace requests a stop; encoding then restarts. In a group only rank 0 encodes.
    """
    folder = workspace.scratch / CACHE / "latents"
    counts = [read_index(path).count for path in shards]
    if not sum(counts):
        raise LatentError(f"there are no samples in {', '.join(map(str, shards))}; train the other clusters only")
    source = {
        "shards": [[str(path), {file.name: file.stat().st_size for file in list_files(path)}] for path in shards],
        "codec": {str(path.relative_to(codec_folder)): checksum(path) for path in list_files(codec_folder)},
    }

    def encode() -> None:
        if _is_reusable(folder, source):
            return
        logger.info("encoding %d samples of %d folders", sum(counts), len(shards))
        with atomic_folder(folder) as temporary:
            _write_latents(temporary, shards, sum(counts), codec, workspace)
            write_record(temporary / SOURCE, {"source": source, "arrays": _checksums(temporary)})

    DataParallelGroup.join().run_on_main(encode)
    return read_latents(folder)


SOURCE = "source.json"
"""What cached latents were encoded from, and the checksums of their arrays."""


def _is_reusable(folder: Path, source: dict[str, Any]) -> bool:
    """Return whether cached latents are of this source and as they were written; log the reason if they are damaged."""
    if not (folder / SOURCE).is_file():
        return False
    try:
        record = read_with_checksum(folder / SOURCE)
        if record["source"] != to_jsonable(source):
            return False
        is_intact = bool(record["arrays"] == _checksums(folder))
    except (CorruptArtifact, KeyError, OSError) as error:
        logger.warning("the cached latents in %s cannot be read (%s); encoding again", folder, error)
        return False
    if not is_intact:
        logger.warning("the cached latents in %s do not match their checksums; encoding again", folder)
    return is_intact


def _checksums(folder: Path) -> dict[str, str]:
    return {name: checksum(folder / f"{name}.npy") for name in _FIELDS}


def read_latents(folder: Path) -> LatentDataset:
    """Open encoded latents as memory maps."""
    arrays = {name: torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c")) for name in _FIELDS}
    return LatentDataset(clean=arrays["clean"], class_id=arrays["class_id"], cluster_id=arrays["cluster_id"])


_FIELDS = ("clean", "class_id", "cluster_id")


def _write_latents(folder: Path, shards: Sequence[Path], count: int, codec: Codec, workspace: Workspace) -> None:
    shapes = {"clean": codec.latent_shape, "class_id": (), "cluster_id": ()}
    maps = {
        name: create_memmap(folder / f"{name}.npy", np.float32 if name == "clean" else np.int64, (count, *shape))
        for name, shape in shapes.items()
    }
    row = 0
    for cluster_id, path in enumerate(shards):
        for batch in read_batches(path, ENCODE_BATCH):
            rows = slice(row, row + len(batch.labels))
            maps["clean"][rows] = codec.encode(batch.images).numpy()
            maps["class_id"][rows] = batch.labels
            maps["cluster_id"][rows] = cluster_id
            row = rows.stop
            workspace.report_progress(row, count, unit="images encoded")
            if row < count and workspace.stop_requested():
                raise Preempted(f"stopped after {row} of {count} images were encoded; encoding restarts")
    for array in maps.values():
        array.flush()
