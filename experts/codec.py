"""What a sample is in storage and what it is to a network; nothing outside this file knows about pixels.

To add a latent space, write a class with these four members and a function that fits one, and put both
into the two dicts at the end.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from artifacts import CorruptArtifact, Workspace, read_json, write_json
from data_partition.pca import PCA, fit_pca
from data_partition.shards import read_batches, read_index
from experts.config import CodecConfig
from experts.noise_path import Latents

Images = UInt8[np.ndarray, "batch height width channel"]
Decoded = Float[Tensor, "batch height width channel"]

FIT_BATCH = 512


@runtime_checkable
class Codec(Protocol):
    """Images in storage to latents of unit scale, and back."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent."""

    def encode(self, images: Images) -> Latents:
        """Latents of images, float32."""

    def decode(self, latents: Latents) -> Decoded:
        """Images in [0, 1] of latents; what lies outside is clipped."""

    def save(self, folder: Path) -> None:
        """Write everything that `load_codec` needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelCodec:
    """Images as they are, in [-1, 1], channels first."""

    image_shape: tuple[int, int, int]
    """Height, width, channels."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Channels, height, width."""
        height, width, channels = self.image_shape
        return channels, height, width

    def encode(self, images: Images) -> Latents:
        """Latents of images, float32."""
        _check_shape(images, self.image_shape)
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1)

    def decode(self, latents: Latents) -> Decoded:
        """Images in [0, 1] of latents; what lies outside is clipped."""
        return latents.float().cpu().permute(0, 2, 3, 1).add(1).div(2).clamp(0, 1)

    def save(self, folder: Path) -> None:
        """Write `codec.json`."""
        write_json(folder / "codec.json", {"kind": "pixels", "image_shape": self.image_shape})


@dataclass(frozen=True, slots=True, kw_only=True)
class PCACodec:
    """Principal components of flattened images in [0, 1], brought to unit scale."""

    image_shape: tuple[int, int, int]
    """Height, width, channels."""
    pca: PCA
    whitening: float
    """Components are divided by their standard deviation to this power, then all by one number: their rms."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Components."""
        return (len(self.pca.variances),)

    @property
    def scale(self) -> Float[Tensor, " component"]:
        """What the components are divided by, so that latents have a root mean square of 1."""
        deviations = np.sqrt(np.maximum(self.pca.variances, self.pca.variances[0] * 1e-9))
        rms = np.sqrt(np.mean(deviations ** (2 - 2 * self.whitening)))
        return torch.from_numpy((deviations**self.whitening * rms).astype(np.float32))

    def encode(self, images: Images) -> Latents:
        """Latents of images, float32."""
        _check_shape(images, self.image_shape)
        return torch.from_numpy(self.pca.encode(_flat(images)).astype(np.float32)).div_(self.scale)

    def decode(self, latents: Latents) -> Decoded:
        """Images in [0, 1] of latents; what lies outside is clipped."""
        flat = self.pca.decode(latents.float().cpu().mul(self.scale).numpy())
        return torch.from_numpy(flat.astype(np.float32)).reshape(-1, *self.image_shape).clamp_(0, 1)

    def save(self, folder: Path) -> None:
        """Write `codec.json`, and the components as safetensors."""
        described = {"kind": "pca", "image_shape": self.image_shape, "whitening": self.whitening}
        write_json(folder / "codec.json", described)
        self.pca.save(folder / "pca.safetensors")


def fit_codec(config: CodecConfig, shards: Path, out: Path, workspace: Workspace) -> Codec:
    """Fit the codec on the images of a shard folder and write it to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    workspace.report(0, 1)
    codec = CODECS[config.kind].fit(config, shards)
    codec.save(out)
    workspace.report(1, 1)
    return codec


def load_codec(folder: Path) -> Codec:
    """Read what `fit_codec` wrote; raises an `ArtifactError` if a file is missing or broken."""
    described = read_json(folder / "codec.json")
    kind = described.get("kind")
    if kind not in CODECS:
        raise CorruptArtifact(f"{folder / 'codec.json'} is of kind {kind!r}; known are {', '.join(CODECS)}")
    return CODECS[kind].load(folder, described)


def _fit_pixels(config: CodecConfig, shards: Path) -> Codec:
    return PixelCodec(image_shape=read_index(shards).image_shape)


def _load_pixels(folder: Path, described: dict[str, Any]) -> Codec:
    return PixelCodec(image_shape=tuple(described["image_shape"]))


def _fit_pca(config: CodecConfig, shards: Path) -> Codec:
    index = read_index(shards)
    most = min(math.prod(index.image_shape), index.count - 1)
    if config.components > most:
        raise ValueError(
            f"{index.count} images of shape {index.image_shape} have at most {most} principal components, "
            f"not {config.components}; lower codec.components"
        )
    pca = fit_pca((_flat(batch.images) for batch in read_batches(shards, FIT_BATCH)), config.components)
    return PCACodec(image_shape=index.image_shape, pca=pca, whitening=config.whitening)


def _load_pca(folder: Path, described: dict[str, Any]) -> Codec:
    pca = PCA.load(folder / "pca.safetensors")
    return PCACodec(image_shape=tuple(described["image_shape"]), pca=pca, whitening=described["whitening"])


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecKind:
    """How one kind of codec is fitted to a shard folder, and read from its own folder and `codec.json`."""

    fit: Callable[[CodecConfig, Path], Codec]
    load: Callable[[Path, dict[str, Any]], Codec]


CODECS: dict[str, CodecKind] = {
    "pixels": CodecKind(fit=_fit_pixels, load=_load_pixels),
    "pca": CodecKind(fit=_fit_pca, load=_load_pca),
}


def _flat(images: Images) -> Float[np.ndarray, "batch pixel"]:
    """Images as rows of numbers in [0, 1]."""
    return images.reshape(len(images), -1).astype(np.float32) / np.float32(255)


def _check_shape(images: Images, expected: tuple[int, ...]) -> None:
    if images.shape[1:] != expected:
        raise ValueError(f"the codec was fitted on images of shape {expected}, not {images.shape[1:]}; fit it again")
