"""Input of convolutional feature extractors."""

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor
from torch.nn import functional


def cnn_input(
    images: UInt8[np.ndarray, "batch height width channel"], side: int
) -> Float32[Tensor, "batch 3 side side"]:
    """Convert images to RGB in [0, 1], scaled to `side` x `side`, with channels last in memory."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    return resize_to_rgb(pixels, side).contiguous(memory_format=torch.channels_last)


def resize_to_rgb(
    images: Float32[Tensor, "batch channel height width"], side: int
) -> Float32[Tensor, "batch 3 side side"]:
    """Return RGB images of `side` x `side` pixels."""
    if images.shape[2:] != (side, side):
        images = functional.interpolate(images, (side, side), mode="bilinear", antialias=True)
    return images.expand(-1, 3, -1, -1)
