"""A small convolutional network that draws an image from its principal components.

Components cut off at a fixed number leave ripples and grey halos. The decoder sees the same latents as the linear
inverse, so nothing changes for experts and router; trained on slightly noised latents, it also forgives small
errors of the samplers.
"""

import math
from collections.abc import Sequence

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

SEED_CHANNELS = 16
"""Channels of the picture of a quarter of the side that the latents are spread into."""

Pictures = Float[Tensor, "batch channel height width"]


class ResidualConv(nn.Module):
    """Two convolutions beside a shortcut; close to the identity at initialisation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.inner = nn.Conv2d(channels, channels, 3, padding=1)
        self.outer = nn.Conv2d(channels, channels, 3, padding=1)
        self.outer.weight.data.mul_(0.1)

    def forward(self, pictures: Pictures) -> Pictures:
        """The pictures plus what this block adds to them."""
        hidden = self.inner(functional.silu(self.norm(pictures)))
        added: Tensor = self.outer(functional.silu(hidden))
        return pictures + added


class ConvDecoder(ModelMixin, ConfigMixin):
    """Latents to images in [-1, 1], by a picture of a quarter of the side that is doubled twice."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, components: int, image_shape: Sequence[int], width: int = 32) -> None:
        super().__init__()
        self.height, self.width, channels = image_shape
        self.seed_shape = (SEED_CHANNELS, math.ceil(self.height / 4), math.ceil(self.width / 4))
        self.spread = nn.Linear(components, math.prod(self.seed_shape))
        self.layers = nn.Sequential(
            nn.Conv2d(SEED_CHANNELS, 2 * width, 3, padding=1),
            ResidualConv(2 * width),
            ResidualConv(2 * width),
            nn.Conv2d(2 * width, 4 * width, 1),
            nn.PixelShuffle(2),
            ResidualConv(width),
            nn.SiLU(),
            nn.Conv2d(width, 4 * channels, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def forward(self, latents: Float[Tensor, "batch component"]) -> Pictures:
        """Images in about [-1, 1]; a side that is no multiple of four is cut to its length."""
        drawn: Tensor = self.layers(self.spread(latents).unflatten(1, self.seed_shape))
        return drawn[:, :, : self.height, : self.width]


def drawing_loss(drawn: Pictures, images: Pictures) -> Float[Tensor, ""]:
    """Mean absolute error of the pixels and of their differences to the neighbours below and to the right.

    The differences keep edges sharp where the pixels alone would be blurred.
    """
    below = (drawn.diff(dim=2) - images.diff(dim=2)).abs().mean()
    right = (drawn.diff(dim=3) - images.diff(dim=3)).abs().mean()
    return (drawn - images).abs().mean() + below + right
