"""Disk and memory of the stages that handle images, for one image of the data set; from the configuration alone."""

import math
from dataclasses import dataclass

from data_partition.shards.offset_index import MAX_WINDOW, ROW, WINDOWS_AHEAD
from ddm_core.hash_join import MAX_ROWS
from experts.config import DEFAULT_CACHE_GB, CodecConfig
from experts.networks.latent_shapes import IMAGE_COMPONENTS, latent_shape_of
from orchestrator.config.schema import RunConfig
from orchestrator.pipeline.stage_configs import latents_config

FILE_OVERHEAD = 3 * 2048
"""Bytes of the headers of an image, its class and its caption in a tar, and of the latter two."""

TEXT_BYTES = 512
"""Bytes of the key and the captions of a sample in an offset index, and of its line of a table."""

ENCODED_IMAGES, ENCODED_BYTES = 512, 2**28
"""Images, and their bytes, that are encoded at a time, whichever are fewer."""

TRAINING = "a training"
"""Where a network is trained on images that are streamed."""

FIT_MATRICES = 4
"""Square matrices of 64 bits, a row for each value of an image, that a fit of principal components has at a time."""

MATCH_BYTES = 40 * MAX_ROWS
"""Of the hashes by which latents are divided."""

COMPARE_BYTES = 2**28
"""Of similarities of images that are compared with others, at most."""

COPIES = 5
"""Bytes in memory for one of an image that is computed on: as it is stored, and as numbers of 32 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSize:
    """What a stage keeps; texts of captions that are encoded are not counted."""

    kind: str
    image_bytes: int
    """On the disk, for one image, at most."""
    memory_bytes: int
    """Of images in memory at a time, whatever their number; networks and libraries come on top."""
    cache_bytes: int = 0
    """On the disk, whatever the number of images; shards that are read ahead."""


def measure_data(config: RunConfig) -> tuple[DataSize, ...]:
    """Return the sizes of the stages that read images; raises `CodecError` if the codec does not fit them."""
    data, streams = config.data, config.data.mode == "stream"
    pixels = max(math.prod(size) for size in data.sizes) * data.channels
    reading = WINDOWS_AHEAD * MAX_WINDOW if streams else pixels
    sample = ROW.itemsize + TEXT_BYTES if streams else pixels + FILE_OVERHEAD
    stored = latents_config(config).store
    # with buckets, each latent takes the place of the longest
    longest = max(_latent_bytes(config.codec, size, data.channels) for size in data.sizes)
    latents = 24 + stored * (1 + data.flip) * longest
    encoding = COPIES * min(ENCODED_IMAGES * pixels, ENCODED_BYTES)
    fit = FIT_MATRICES * 8 * (data.image_size**2 * data.channels) ** 2
    batch = reading + config.partition.batch_size * COPIES * pixels
    features = batch + (fit if config.partition.features == "pixels" else 0)
    codec = encoding + (fit if config.codec.kind in IMAGE_COMPONENTS else 0)
    compared = COMPARE_BYTES if data.duplicates == "remove" else 0
    training = config.expert.training
    ahead = training.batch_size * COPIES * pixels
    cache_gb = DEFAULT_CACHE_GB if training.cache_gb is None else training.cache_gb
    return (
        DataSize(kind="dataset", image_bytes=sample, memory_bytes=reading + COPIES * pixels + compared),
        DataSize(kind="codec", image_bytes=0, memory_bytes=reading + codec),
        DataSize(kind="latents", image_bytes=latents, memory_bytes=reading + encoding),
        DataSize(kind="features", image_bytes=_feature_bytes(config), memory_bytes=features),
        DataSize(
            kind="partition",
            image_bytes=sample + latents + TEXT_BYTES,
            memory_bytes=batch + MATCH_BYTES,
        ),
        DataSize(
            kind=TRAINING,
            image_bytes=0,
            memory_bytes=0 if stored else 3 * ahead + (WINDOWS_AHEAD * MAX_WINDOW if cache_gb else 0),
            cache_bytes=0 if stored else int(cache_gb * 1e9),
        ),
    )


def _latent_bytes(codec: CodecConfig, size: tuple[int, int], channels: int) -> int:
    """Return the bytes of the latent of an image of a height and a width."""
    by_height, by_width = (latent_shape_of(codec, side, channels) for side in size)
    count = by_height[0] * by_height[1] * by_width[2] if len(by_height) == 3 else math.prod(by_height)
    return count * (2 if codec.kind.startswith("autoencoder") else 4)


def _feature_bytes(config: RunConfig) -> int:
    width = config.partition.components if config.partition.features == "pixels" else 1280
    return 4 * width + TEXT_BYTES
