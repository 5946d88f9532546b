"""Principal components of images as latents, fitted in one pass over the images."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from data_partition.features.pca import PCA, fit_pca
from data_partition.shards.shards import read_batches, read_index
from ddm_core.artifacts import write_json
from experts.codec import check_shape
from experts.config import CodecConfig
from experts.errors import CodecError
from experts.types import DecodedImages, Images, Latents

FIT_BATCH = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class PCACodec:
    """Encodes flattened images in [0, 1] as principal components of unit scale."""

    image_shape: tuple[int, int, int]
    """Height, width, channels."""
    pca: PCA
    whitening: float
    """Components are divided by their standard deviation to this power, then all by their root mean square."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Return the number of components."""
        return (len(self.pca.variances),)

    @property
    def scale(self) -> Float[Tensor, " component"]:
        """Return the divisors that give latents a root mean square of 1."""
        deviations = np.sqrt(np.maximum(self.pca.variances, self.pca.variances[0] * 1e-9))
        rms = np.sqrt(np.mean(deviations ** (2 - 2 * self.whitening)))
        return torch.from_numpy((deviations**self.whitening * rms).astype(np.float32))

    def encode(self, images: Images) -> Latents:
        """Return the latents of images, float32."""
        check_shape(images, self.image_shape)
        return torch.from_numpy(self.pca.encode(flatten_images(images)).astype(np.float32)).div_(self.scale)

    def decode(self, latents: Latents) -> DecodedImages:
        """Return the images of latents, clipped to [0, 1]."""
        flat = self.pca.decode(latents.float().cpu().mul(self.scale).numpy())
        return torch.from_numpy(flat.astype(np.float32)).reshape(-1, *self.image_shape).clamp_(0, 1)

    def with_size(self, height: int, width: int) -> "PCACodec":
        """Return this codec for its own size; raise `CodecError` for another, of which it has no components."""
        if (height, width) != self.image_shape[:2]:
            raise CodecError(
                f"principal components of whole images have one size, {self.image_shape[1]}x{self.image_shape[0]}, not "
                f"{width}x{height}; use codec=patch_pca, pixels or an autoencoder"
            )
        return self

    def save(self, folder: Path) -> None:
        """Write `codec.json`, and the components as safetensors."""
        metadata = {"kind": "pca", "image_shape": self.image_shape, "whitening": self.whitening}
        write_json(folder / "codec.json", metadata)
        self.pca.save(folder / "pca.safetensors")


def fit_pca_codec(config: CodecConfig, shards: Path) -> PCACodec:
    """Fit the components on the images of a shard folder; raise `ValueError` if there are fewer than configured."""
    index = read_index(shards)
    limit = min(math.prod(index.image_shape), index.count - 1)
    if config.components > limit:
        raise ValueError(
            f"{index.count} images of shape {index.image_shape} have at most {limit} principal components, "
            f"not {config.components}; lower codec.components"
        )
    pca = fit_pca((flatten_images(batch.images) for batch in read_batches(shards, FIT_BATCH)), config.components)
    return PCACodec(image_shape=index.image_shape, pca=pca, whitening=config.whitening)


def load_pca_codec(folder: Path, metadata: dict[str, Any]) -> PCACodec:
    """Load a folder that `PCACodec.save` wrote; `metadata` is its `codec.json`."""
    pca = PCA.load(folder / "pca.safetensors")
    if len(pca.mean) != math.prod(metadata["image_shape"]):
        raise ValueError(f"images of shape {metadata['image_shape']} have not the {len(pca.mean)} values of pca.mean")
    return PCACodec(image_shape=tuple(metadata["image_shape"]), pca=pca, whitening=metadata["whitening"])


def flatten_images(images: Images) -> Float[np.ndarray, "batch pixel"]:
    """Return images as rows of numbers in [0, 1]."""
    return images.reshape(len(images), -1).astype(np.float32) / np.float32(255)
