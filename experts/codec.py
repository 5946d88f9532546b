"""What a sample is in storage and what it is to a network: the seam, and the simplest implementation.

Nothing outside the codecs knows about pixels. `codecs.py` lists them and says how to add one.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ddm_core.artifacts import write_json
from experts.diffusion.noise_schedule import Latents

Images = UInt8[np.ndarray, "batch height width channel"]
Decoded = Float[Tensor, "batch height width channel"]


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
        check_shape(images, self.image_shape)
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1)

    def decode(self, latents: Latents) -> Decoded:
        """Images in [0, 1] of latents; what lies outside is clipped."""
        return latents.float().cpu().permute(0, 2, 3, 1).add(1).div(2).clamp(0, 1)

    def save(self, folder: Path) -> None:
        """Write `codec.json`."""
        write_json(folder / "codec.json", {"kind": "pixels", "image_shape": self.image_shape})


def check_shape(images: Images, expected: tuple[int, ...]) -> None:
    """Raise `ValueError` for images that the codec was not made for."""
    if images.shape[1:] != expected:
        raise ValueError(f"the codec was fitted on images of shape {expected}, not {images.shape[1:]}; fit it again")
