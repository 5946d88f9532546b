"""Principal components of square patches as latents with a height and a width, fitted in one pass over the images."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from data_partition.features.pca import fit_pca
from data_partition.shards.shards import read_batches, read_index
from ddm_core.artifacts import write_json
from experts.codec import check_shape
from experts.codecs.pca import FIT_BATCH, PCACodec, flatten_images, load_pca_codec
from experts.config import CodecConfig
from experts.errors import CodecError
from experts.types import DecodedImages, Images, Latents


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchPCACodec:
    """Encodes every patch of an image with one `PCACodec`, whose images are the patches."""

    image_shape: tuple[int, int, int]
    """Height, width, channels."""
    patches: PCACodec

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Return components, and rows and columns of patches."""
        side = self.patches.image_shape[0]
        return *self.patches.latent_shape, self.image_shape[0] // side, self.image_shape[1] // side

    def encode(self, images: Images) -> Latents:
        """Return the latents of images, float32."""
        check_shape(images, self.image_shape)
        _, rows, columns = self.latent_shape
        codes = self.patches.encode(cut_patches(images, self.patches.image_shape[0]))
        return codes.reshape(len(images), rows, columns, -1).permute(0, 3, 1, 2).contiguous()

    def decode(self, latents: Latents) -> DecodedImages:
        """Return the images of latents, clipped to [0, 1]."""
        patches = self.patches.decode(latents.permute(0, 2, 3, 1).flatten(0, 2))
        grid = patches.reshape(len(latents), *self.latent_shape[1:], *self.patches.image_shape)
        return grid.transpose(2, 3).reshape(len(latents), *self.image_shape)

    def with_size(self, height: int, width: int) -> "PatchPCACodec":
        """Return the codec for images of this size; raise `CodecError` if its patches do not divide them."""
        side = self.patches.image_shape[0]
        if height % side or width % side:
            raise CodecError(f"patches of side {side} do not divide images of {width}x{height}; choose a multiple")
        return replace(self, image_shape=(height, width, self.image_shape[2]))

    def save(self, folder: Path) -> None:
        """Write the codec of the patches, and `codec.json`."""
        self.patches.save(folder)
        metadata = {"kind": "patch_pca", "image_shape": self.image_shape, "patch_size": self.patches.image_shape[0]}
        write_json(folder / "codec.json", metadata | {"whitening": self.patches.whitening})


def fit_patch_pca_codec(config: CodecConfig, shards: Path) -> PatchPCACodec:
    """Fit the components on all patches of a shard folder, whose images they divide."""
    image_shape = read_index(shards).image_shape
    patches = (cut_patches(batch.images, config.patch_size) for batch in read_batches(shards, FIT_BATCH))
    pca = fit_pca(map(flatten_images, patches), config.latent_channels)
    patch_shape = (config.patch_size, config.patch_size, image_shape[2])
    codec = PCACodec(image_shape=patch_shape, pca=pca, whitening=config.whitening)
    return PatchPCACodec(image_shape=image_shape, patches=codec)


def load_patch_pca_codec(folder: Path, metadata: dict[str, Any]) -> PatchPCACodec:
    """Load a folder that `PatchPCACodec.save` wrote; `metadata` is its `codec.json`."""
    shape, side = tuple(metadata["image_shape"]), metadata["patch_size"]
    if shape[0] % side or shape[1] % side:
        raise ValueError(f"patches of side {side} do not divide images of shape {shape}")
    patches = load_pca_codec(folder, metadata | {"image_shape": (side, side, shape[2])})
    return PatchPCACodec(image_shape=shape, patches=patches)


def cut_patches(images: Images, side: int) -> UInt8[np.ndarray, "patch side side channel"]:
    """Return the patches of images, row by row, as a batch of images."""
    count, height, width, channels = images.shape
    grid = images.reshape(count, height // side, side, width // side, side, channels)
    return grid.swapaxes(2, 3).reshape(-1, side, side, channels)
