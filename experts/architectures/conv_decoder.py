"""A small convolutional decoder of principal components.

A truncated set of components leaves ripples and gray halos in the linear inverse. The latents stay the same, so experts
and router do not change. Training on slightly noised latents makes it robust to small sampling errors.
"""

import math
from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from experts.types import ImageTensor, Latents

SEED_CHANNELS = 16
"""Channels of the feature map, a quarter of the image's side, that the latents are projected to."""


class ResidualConv(nn.Module):
    """Two convolutions with a skip connection; close to the identity at initialization."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.inner = nn.Conv2d(channels, channels, 3, padding=1)
        self.outer = nn.Conv2d(channels, channels, 3, padding=1)
        self.outer.weight.data.mul_(0.1)

    def forward(self, features: ImageTensor) -> ImageTensor:
        """Return the features plus the block's residual."""
        hidden = self.inner(functional.silu(self.norm(features)))
        residual: Tensor = self.outer(functional.silu(hidden))
        return features + residual


class ConvDecoder(ModelMixin, ConfigMixin):
    """Maps latents to images in [-1, 1], by a feature map of a quarter of the side that is upsampled twice.

    Without `components` it takes images, and adds such a map as a correction; it begins as the identity.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, components: int, image_shape: Sequence[int], width: int = 32) -> None:
        super().__init__()
        self.height, self.width, channels = image_shape
        self.seed_shape = (SEED_CHANNELS, math.ceil(self.height / 4), math.ceil(self.width / 4))
        self.spread = nn.Linear(components, math.prod(self.seed_shape)) if components else None
        last = nn.Conv2d(width, 4 * channels, 3, padding=1, bias=bool(components))
        self.layers = nn.Sequential(
            nn.Conv2d(SEED_CHANNELS if components else 16 * channels, 2 * width, 3, padding=1),
            ResidualConv(2 * width),
            ResidualConv(2 * width),
            nn.Conv2d(2 * width, 4 * width, 1),
            nn.PixelShuffle(2),
            ResidualConv(width),
            nn.SiLU(),
            last,
            nn.PixelShuffle(2),
        )
        if not components:
            nn.init.zeros_(last.weight)

    def forward(self, coarse: Latents) -> ImageTensor:
        """Return images in about [-1, 1], from images or latents; a side that is not a multiple of four is cropped."""
        if self.spread is not None:
            images = self._convolve(self.spread(coarse).unflatten(1, self.seed_shape))
            return images[:, :, : self.height, : self.width]
        height, width = coarse.shape[2:]
        padded = functional.pad(coarse, (0, -width % 4, 0, -height % 4), mode="replicate")
        correction = self._convolve(functional.pixel_unshuffle(padded, 4))
        return coarse + correction[:, :, :height, :width]

    def _convolve(self, features: Tensor) -> Tensor:
        """Apply the layers with channels last, in an eighth less time on a CPU."""
        images: Tensor = self.layers(features.contiguous(memory_format=torch.channels_last))
        return images


def decoder_loss(decoded: ImageTensor, images: ImageTensor) -> Float[Tensor, ""]:
    """Return the mean absolute error of the pixels and of their differences to the neighbors below and to the right.

    The differences keep edges sharp that a loss on pixels alone would blur.
    """
    below = (decoded.diff(dim=2) - images.diff(dim=2)).abs().mean()
    right = (decoded.diff(dim=3) - images.diff(dim=3)).abs().mean()
    return (decoded - images).abs().mean() + below + right
