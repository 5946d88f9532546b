"""Bytes to pixels and back, and the one size that all images of a data set have."""

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
"""What is decoded, by Pillow's names, and how such files are called; nothing that starts another program."""

MAX_PIXELS = 64_000_000
"""An image that claims more is a decompression bomb or a mistake."""

BROKEN = (
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
"""What Pillow raises for bytes that are not an image."""


def decode_image(data: bytes) -> Pixels:
    """Pixels of an image file, grey or RGB, transparency on white, upright; raises `UnreadableImage`."""
    try:
        with Image.open(io.BytesIO(data), formats=tuple(FORMATS)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UnreadableImage(f"{image.width}x{image.height} are more than {MAX_PIXELS} pixels")
            return pixels_of(flatten(ImageOps.exif_transpose(image)))
    except BROKEN as error:
        raise UnreadableImage(f"not a readable image: {error}") from error


def flatten(image: Image.Image) -> Image.Image:
    """A grey or RGB image; what is transparent becomes white."""
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode in ("1", "LA") else "RGB")


def pixels_of(image: Image.Image) -> Pixels:
    """The pixels of a grey or RGB image, with a channel axis."""
    pixels = np.array(image, dtype=np.uint8)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def image_of(pixels: Pixels) -> Image.Image:
    """The image with these pixels."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def encode_png(pixels: Pixels) -> bytes:
    """A lossless PNG; the same pixels give the same bytes."""
    buffer = io.BytesIO()
    image_of(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def fit_image(pixels: Pixels, config: DataConfig, key: str) -> UInt8[np.ndarray, "side side depth"]:
    """An image at the size and channels of the data set; raises `MixedSizes` if it must not be scaled."""
    side, height, width = config.image_size, *pixels.shape[:2]
    if (height, width) == (side, side) and pixels.shape[2] == config.channels:
        return pixels
    image = image_of(pixels)
    if (height, width) != (side, side):
        if config.fit == "exact":
            raise MixedSizes(
                f"{key} is {width}x{height}, but with data.fit=exact every image must be {side}x{side}; "
                f"set data.fit=crop, or data.image_size to the size all images have"
            )
        image = ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)
    return pixels_of(image.convert("L" if config.channels == 1 else "RGB"))
