"""The order of streamed samples: tars in a random order, and blocks of several tars shuffled inside.

It is a function of (seed, epoch) alone, so a step has its samples whatever was read before, and by how many threads.
Only two blocks need to be near at a time: the present one, and the next one, which is read meanwhile.
"""

import bisect
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ddm_core.random_bits import Stream
from experts.training.latent_dataset import derive_seed
from experts.types import RowIds


@dataclass(frozen=True, slots=True)
class ShardOrder:
    """Samples of tars, numbered tar by tar."""

    counts: tuple[int, ...]
    """Samples of each tar; all positive."""
    block_tars: int
    """Tars of a block."""
    seed: int

    @property
    def count(self) -> int:
        """Return the number of samples."""
        return sum(self.counts)

    def rows(self, batch_size: int, step: int) -> RowIds:
        """Return the samples of a step, counted from 0: the next of the sequence of epochs."""
        parts = []
        position, end = step * batch_size, (step + 1) * batch_size
        while position < end:
            epoch, block, offset = self.find(position)
            parts.append(_block_rows(self, epoch, block)[offset : offset + end - position])
            position += len(parts[-1])
        return torch.cat(parts)

    def find(self, position: int) -> tuple[int, int, int]:
        """Return the epoch and the block of a position of the sequence, and its offset in the block."""
        epoch, offset = divmod(position, self.count)
        _, ends = _blocks(self, epoch)
        block = bisect.bisect_right(ends, offset) - 1
        return epoch, block, offset - ends[block]

    def tars_from(self, position: int) -> Iterator[tuple[int, ...]]:
        """Yield the tars of the block of a position, of the next one, and so on without end."""
        epoch, block, _ = self.find(position)
        yield from _blocks(self, epoch)[0][block:]
        for later in itertools.count(epoch + 1):
            yield from _blocks(self, later)[0]


@functools.lru_cache(maxsize=8)
def _blocks(order: ShardOrder, epoch: int) -> tuple[list[tuple[int, ...]], list[int]]:
    """Return the tars of every block of an epoch, and where each block starts; the last entry is the epoch's end."""
    generator = torch.Generator().manual_seed(derive_seed(Stream.TAR_ORDER, order.seed, epoch))
    tars = torch.randperm(len(order.counts), generator=generator).tolist()
    blocks = [tuple(tars[start : start + order.block_tars]) for start in range(0, len(tars), order.block_tars)]
    sizes = (sum(order.counts[tar] for tar in block) for block in blocks)
    return blocks, list(itertools.accumulate(sizes, initial=0))


@functools.lru_cache(maxsize=4)
def _block_rows(order: ShardOrder, epoch: int, block: int) -> RowIds:
    """Return the samples of a block in their order."""
    (blocks, _), ends = _blocks(order, epoch), list(itertools.accumulate(order.counts, initial=0))
    rows = torch.cat([torch.arange(ends[tar], ends[tar + 1]) for tar in blocks[block]])
    index = epoch * len(blocks) + block
    generator = torch.Generator().manual_seed(derive_seed(Stream.BLOCK_ORDER, order.seed, index))
    return rows[torch.randperm(len(rows), generator=generator)]
