"""Convert images to bytes, grids and PNG files."""

import io

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from data_partition.shards.images import tile_pixels, to_image

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
    return to_image(tile_pixels(to_bytes(images), columns, gap))


def encode_png(image: Image.Image) -> bytes:
    """Encode an image as PNG; equal images give equal bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
