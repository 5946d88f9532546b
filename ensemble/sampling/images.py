"""Images as people look at them: bytes, grids, PNG files."""

import io
import math

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

Images = Float[Tensor, "batch height width channel"]
"""Grey or RGB, from 0 to 1; values outside are clipped."""


def to_bytes(images: Images) -> UInt8[np.ndarray, "batch height width channel"]:
    """Images as a data set stores them, rounded to 256 levels."""
    levels = (images.detach().clamp(0, 1) * 255).round()
    return levels.cpu().numpy().astype(np.uint8)


def grid(images: Images, columns: int = 8, gap: int = 1) -> Image.Image:
    """The images side by side in reading order, `gap` white pixels apart; empty places are black.

    Raises `ValueError` when there is nothing to show.
    """
    if not len(images) or columns < 1:
        raise ValueError(f"a grid needs an image and a column; got {len(images)} images, {columns} columns")
    tiles = to_bytes(images)
    count, height, width, channels = tiles.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    table = np.zeros((rows * columns, height + gap, width + gap, channels), np.uint8)
    table[:count, :height, :width] = tiles
    table[:, height:] = table[:, :, width:] = 255
    canvas = table.reshape(rows, columns, height + gap, width + gap, channels).transpose(0, 2, 1, 3, 4)
    canvas = canvas.reshape(rows * (height + gap), columns * (width + gap), channels)
    canvas = canvas[: len(canvas) - gap, : canvas.shape[1] - gap]
    return Image.fromarray(canvas[..., 0] if channels == 1 else canvas)


def png(image: Image.Image) -> bytes:
    """The file that `image` is as a PNG; equal images give equal bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
