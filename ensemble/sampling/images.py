"""Convert images to bytes, grids and PNG files."""

import io
import math

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

Images = Float[Tensor, "batch height width channel"]
"""Gray or RGB, from 0 to 1; values outside are clipped."""


def to_bytes(images: Images) -> UInt8[np.ndarray, "batch height width channel"]:
    """Convert images to the format of a data set, rounded to 256 levels."""
    levels = (images.detach().clamp(0, 1) * 255).round()
    return levels.cpu().numpy().astype(np.uint8)


def image_grid(images: Images, columns: int = 8, gap: int = 1) -> Image.Image:
    """Arrange images in reading order, `gap` white pixels apart; empty cells are black.

    Raises `ValueError` without images or columns.
    """
    if not len(images) or columns < 1:
        raise ValueError(
            f"a grid needs an image and a column; got {len(images)} images, {columns} columns; pass at least one each"
        )
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


def encode_png(image: Image.Image) -> bytes:
    """Encode an image as PNG; equal images give equal bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
