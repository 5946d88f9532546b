"""Codecs: the interface between images in storage and the latents that networks train on, and pixels as latents.

No other module depends on pixels. `codecs/registry.py` lists the codecs and explains how to add one.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from ddm_core.artifacts import write_json
from experts.types import DecodedImages, Images, Latents

ENCODER = "encoder"
"""Folder of the codec that encodes, below that of a codec with a decoder of its own."""


def encoder_folder(folder: Path) -> Path:
    """Return the folder of the codec that encodes: the codec's own, unless it has a decoder of its own.

    Its files identify latents, and the experts that are trained on them.
    """
    encoder = folder / ENCODER
    return encoder if encoder.is_dir() else folder


@runtime_checkable
class Codec(Protocol):
    """Encodes images in storage as latents of unit scale, and decodes them."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return height, width and channels of an image."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Return the shape of one latent."""

    def encode(self, images: Images) -> Latents:
        """Return the latents of images, float32 in CPU memory; a network encodes on torch's default device."""

    def decode(self, latents: Latents) -> DecodedImages:
        """Return the images of latents, clipped to [0, 1]; a network decodes on the device of the latents."""

    def with_size(self, height: int, width: int) -> "Codec":
        """Return the codec for images of this size; raise `CodecError` if it has only one."""

    def save(self, folder: Path) -> None:
        """Write all files that `load_codec` reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelCodec:
    """Uses pixels in [-1, 1], channels first, as latents."""

    image_shape: tuple[int, int, int]
    """Height, width, channels."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Return channels, height, width."""
        height, width, channels = self.image_shape
        return channels, height, width

    def encode(self, images: Images) -> Latents:
        """Return the latents of images, float32."""
        check_shape(images, self.image_shape)
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1)

    def decode(self, latents: Latents) -> DecodedImages:
        """Return the images of latents, clipped to [0, 1]."""
        return latents.float().cpu().permute(0, 2, 3, 1).add(1).div(2).clamp(0, 1)

    def with_size(self, height: int, width: int) -> "PixelCodec":
        """Return the codec for images of this size."""
        return replace(self, image_shape=(height, width, self.image_shape[2]))

    def save(self, folder: Path) -> None:
        """Write `codec.json`."""
        write_json(folder / "codec.json", {"kind": "pixels", "image_shape": self.image_shape})


def check_shape(images: Images, expected: tuple[int, ...]) -> None:
    """Raise `ValueError` for images of another shape than the codec's."""
    if images.shape[1:] != expected:
        raise ValueError(f"the codec was fitted on images of shape {expected}, not {images.shape[1:]}; fit it again")
