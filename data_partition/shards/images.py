"""Decode, encode and resize images; all images of a data set have the same size."""

import io
import struct
import zlib

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from data_partition.config import DataConfig
from data_partition.errors import MixedSizes, UnreadableImage

Pixels = UInt8[np.ndarray, "height width channel"]

FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm"),
}
"""Formats that are decoded, by Pillow's names, with their file suffixes; none of them starts another program."""

MAX_PIXELS = 64_000_000
"""An image with more pixels in its header is a decompression bomb or an error."""

DECODE_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    SyntaxError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
"""Errors that Pillow raises for bytes that are not an image."""


def decode_image(data: bytes) -> Pixels:
    """Decode an image file to gray or RGB pixels, transparency on white, upright; raises `UnreadableImage`."""
    try:
        with Image.open(io.BytesIO(data), formats=tuple(FORMATS)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UnreadableImage(f"{image.width}x{image.height} are more than {MAX_PIXELS} pixels")
            return to_pixels(to_gray_or_rgb(ImageOps.exif_transpose(image)))
    except DECODE_ERRORS as error:
        raise UnreadableImage(f"not a readable image: {error}") from error


def to_gray_or_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to gray or RGB; transparent areas become white."""
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode in ("1", "LA") else "RGB")


def to_pixels(image: Image.Image) -> Pixels:
    """Return the pixels of a gray or RGB image, with a channel axis."""
    pixels = np.array(image, dtype=np.uint8)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def to_image(pixels: Pixels) -> Image.Image:
    """Return the image with these pixels."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def encode_png(pixels: Pixels) -> bytes:
    """Encode pixels as a lossless PNG; the same pixels give the same bytes."""
    buffer = io.BytesIO()
    to_image(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def fit_image(pixels: Pixels, config: DataConfig, key: str) -> UInt8[np.ndarray, "side side depth"]:
    """Convert an image to the configured size and channels; raises `MixedSizes` if scaling is not allowed."""
    side, height, width = config.image_size, *pixels.shape[:2]
    if (height, width) == (side, side) and pixels.shape[2] == config.channels:
        return pixels
    image = to_image(pixels)
    if (height, width) != (side, side):
        if config.fit == "exact":
            raise MixedSizes(
                f"{key} is {width}x{height}, but with data.fit=exact every image must be {side}x{side}; "
                f"set data.fit=crop, or data.image_size to the common size of all images"
            )
        image = ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)
    return to_pixels(image.convert("L" if config.channels == 1 else "RGB"))
