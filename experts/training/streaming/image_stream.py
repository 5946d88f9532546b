"""Images of a training that stay in tars of the user: read ahead, decoded and encoded when a batch needs them.

    tars ──ranges──► cache of bounded size ──threads──► images ──codec──► latents of a batch

Threads and cache decide when an image is read, never which one: `ShardOrder` is a function of (seed, epoch) alone.
"""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from data_partition.errors import CacheFull
from data_partition.shards.images import Pixels, decode_fitted
from data_partition.shards.range_cache import RangeCache
from data_partition.shards.shards import open_offsets
from experts.codec import Codec
from experts.config import DEFAULT_CACHE_GB, TrainingConfig
from experts.training.streaming.shard_order import ShardOrder
from experts.types import Latents, RowIds

IMAGES = "images"
"""Folder with the offset index of samples, below that of their latents."""

DIRECT_READERS = 4
"""Threads of single reads outside a training."""

MIN_BLOCKS, MAX_BLOCKS = 2, 8
"""Blocks of shards that a cache needs room for, the present one and the next one, and those that are read ahead at
most."""


class ImageStream:
    """The samples of one or more offset indexes, numbered folder by folder."""

    def __init__(self, codec: Codec, folders: Sequence[Path]) -> None:
        """Open the folders; raises `ShardError`."""
        self.codec = codec
        opened = [open_offsets(folder) for folder in folders]
        self.indexes = [index for index, _ in opened]
        self.configs = [config for _, config in opened]
        self.first_rows = np.cumsum([0, *(len(index.rows) for index in self.indexes)])
        tars: dict[str, list[tuple[int, int]]] = {}
        for number, index in enumerate(self.indexes):
            for tar, source in enumerate(index.tars):
                tars.setdefault(source.url, []).append((number, tar))
        self.parts = list(tars.values())
        """Of each tar of the user, its parts as (folder, tar of this folder)."""
        ranges = [self._rows_of(*part) for part in itertools.chain.from_iterable(self.parts)]
        sizes = torch.tensor([len(rows) for rows in ranges])
        self._ends = sizes.cumsum(0)
        self._shifts = torch.tensor([rows.start for rows in ranges]) - (self._ends - sizes)
        """From positions in the order of the tars to rows, by part."""
        self.counts = tuple(sum(len(self._rows_of(*part)) for part in parts) for parts in self.parts)
        self._cache: RangeCache | None = None
        self._readers: ThreadPoolExecutor | None = None
        self._device = "cpu"
        self._near: tuple[ShardOrder, int, int] | None = None
        self._num_blocks = MIN_BLOCKS

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Return the shape of one latent."""
        return self.codec.latent_shape

    def latents(self, rows: RowIds, is_flipped: Bool[Tensor, " row"] | None = None) -> Latents:
        """Return the latents of samples, of mirrored images where `is_flipped`; raises what a read raises."""
        if self._readers is None:
            with ThreadPoolExecutor(DIRECT_READERS) as readers:
                images = list(readers.map(self.image, rows.tolist()))
        else:
            images = list(self._readers.map(self.image, rows.tolist()))
        if is_flipped is not None:
            flips = is_flipped.tolist()
            images = [image[:, ::-1] if flip else image for image, flip in zip(images, flips, strict=True)]
        if not images:
            return torch.zeros(0, *self.latent_shape)
        with torch.device(self._device):
            return self.codec.encode(np.stack(images)).cpu().float()

    def image(self, row: int) -> Pixels:
        """Return the image of one sample at its size in the data set."""
        number = int(np.searchsorted(self.first_rows, row, "right")) - 1
        index, local = self.indexes[number], row - int(self.first_rows[number])
        data = index.read(local) if self._cache is None else self._cache.read(index, local)
        return decode_fitted(data, self.configs[number], f"row {local} of {index.folder}")

    def batch_rows(self, config: TrainingConfig, step: int) -> RowIds:
        """Return the samples of a step, and begin to read those of its block and of the next ones."""
        order = ShardOrder(self.counts, config.shuffle_shards, config.seed)
        self._read_ahead(order, step * config.batch_size)
        positions = order.rows(config.batch_size, step)
        return positions + self._shifts[torch.searchsorted(self._ends, positions, right=True)]

    @contextmanager
    def reading(self, config: TrainingConfig, cache: Path) -> Iterator[None]:
        """Read ahead in threads, through a cache in a folder; raises `CacheFull` if it cannot hold two blocks."""
        max_bytes = self._size_cache(config)
        with ExitStack() as stack:
            self._readers = stack.enter_context(ThreadPoolExecutor(config.readers, thread_name_prefix="decode"))
            self._cache = stack.enter_context(RangeCache(cache, max_bytes)) if max_bytes else None
            self._device, self._near = config.device, None
            try:
                yield
            finally:
                self._readers, self._cache, self._device = None, None, "cpu"

    def _rows_of(self, number: int, tar: int) -> range:
        """Return the samples of a part of a tar."""
        first = int(self.first_rows[number])
        rows = self.indexes[number].rows_of(tar)
        return range(first + rows.start, first + rows.stop)

    def _read_ahead(self, order: ShardOrder, position: int) -> None:
        """Fetch the tars of the block of a position and of the next blocks, once a block."""
        if self._cache is None:
            return
        block = (order, *order.find(position)[:2])
        if block == self._near:
            return
        self._near = block
        for tars in itertools.islice(order.tars_from(position), self._num_blocks):
            for number, tar in itertools.chain.from_iterable(self.parts[tar] for tar in tars):
                self._cache.fetch(self.indexes[number], tar)

    def _size_cache(self, config: TrainingConfig) -> int:
        """Return the configured bytes of the cache, and set how many blocks are read ahead.

        Raises `CacheFull` if two blocks of shards have no room.
        """
        cache_gb = config.cache_gb
        if cache_gb is None:
            cache_gb = 0.0 if all(index.is_local for index in self.indexes) else DEFAULT_CACHE_GB
        sizes = sorted((self._tar_bytes(parts) for parts in self.parts), reverse=True)
        block = sum(sizes[: config.shuffle_shards])
        if 0 < cache_gb * 1e9 < MIN_BLOCKS * block:
            raise CacheFull(
                f"training.cache_gb={cache_gb:g} has no room for {MIN_BLOCKS} blocks of "
                f"training.shuffle_shards={config.shuffle_shards} shards, {MIN_BLOCKS * block / 1e9:.3g} GB; raise "
                "cache_gb, lower shuffle_shards, or set cache_gb=0, with a request for each image"
            )
        self._num_blocks = min(MAX_BLOCKS, int(cache_gb * 1e9 / max(block, 1)))
        return int(cache_gb * 1e9)

    def _tar_bytes(self, parts: Sequence[tuple[int, int]]) -> int:
        """Return the bytes of the image files of a tar's parts."""
        return sum(int(self.indexes[number].sizes(self.indexes[number].rows_of(tar)).sum()) for number, tar in parts)
