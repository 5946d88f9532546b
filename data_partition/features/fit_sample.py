"""The images that an extractor is fitted on: all, or so many spread over the data that time does not grow with them."""

from collections.abc import Iterator
from pathlib import Path

from data_partition.shards.shards import ImageBatch, read_batches, read_index

MAX_IMAGES = 2**18
"""Most images of a fit; a mean or a covariance of some thousand pixels hardly changes with more."""


def read_fit_batches(shards: Path, batch_size: int, limit: int = MAX_IMAGES) -> Iterator[ImageBatch]:
    """Yield all images in batches, or of more than `limit` images that many, in batches at equal distances."""
    count = read_index(shards).count
    if count <= limit:
        yield from read_batches(shards, batch_size)
        return
    for start in range(0, count, count // max(limit // batch_size, 1)):
        yield next(read_batches(shards, batch_size, start))


def count_fit_images(count: int) -> int:
    """Return the images of a fit, of so many."""
    return min(count, MAX_IMAGES)
