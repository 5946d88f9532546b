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
    if pixels.shape[2:] != (side, side):
        pixels = functional.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
    return pixels.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
