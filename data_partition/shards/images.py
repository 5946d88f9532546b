"""Decode, encode and resize images; all images of a data set have the same size."""

import contextlib
import io
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from data_partition.config import DataConfig
from data_partition.errors import MixedSizes, UnreadableImage
from data_partition.shards.color import to_gray_or_rgb
from data_partition.shards.untrusted import make_printable

Pixels = UInt8[np.ndarray, "height width channel"]
Fitted = UInt8[np.ndarray, "new_height new_width depth"]

FORMATS = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".pjp", ".mpo"),
    "WEBP": (".webp",),
    "AVIF": (".avif",),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
}
"""Formats that are decoded, by Pillow's names, with their file suffixes; none of them starts another program."""

SUFFIXES = tuple(suffix for kind in FORMATS.values() for suffix in kind)

STORED = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "avif": "AVIF"}
"""Extensions of images in shards, with Pillow's names."""

METADATA = ("exif", "xmp", "icc_profile", "photoshop", "comment", "XML:com.adobe.xmp")
"""A file with one of these is never stored itself: they turn or recolour it, or tell where and by whom it was made."""

MAX_PIXELS = 64_000_000
"""An image with more pixels in its header is a decompression bomb or an error."""

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by its EXIF orientation."""

MAX_REASON = 200
"""Characters of another library's message that are shown."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """Pixels of an image file, and what was left out or converted to get them."""

    pixels: Pixels
    remarks: tuple[str, ...]
    extension: str = ""
    """The extension under which shards may store the file itself; empty: they store its pixels."""


def decode_image(data: bytes) -> Pixels:
    """Decode an image file to gray or sRGB pixels, transparency on white, upright; raises `UnreadableImage`."""
    return decode_with_remarks(data).pixels


def decode_with_remarks(data: bytes) -> Decoded:
    """Decode an image file like `decode_image`, and say what was converted; raises `UnreadableImage`."""
    with _opened(data) as image:
        upright, remarks, is_turned = _turn_upright(image)
        is_plain = not remarks and not is_turned and not any(name in image.info for name in METADATA)
        extension = next((name for name, kind in STORED.items() if kind == image.format and is_plain), "")
        return Decoded(to_pixels(upright), tuple(remarks), extension)


def decode_fitted(data: bytes, config: DataConfig, key: str) -> Fitted:
    """Return what `fit_image` makes of `decode_image`, without the pixels between; raises what both raise."""
    with _opened(data) as image:
        upright, _, _ = _turn_upright(image)
        return to_pixels(_fit(upright, config, key))


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """Open an image file; raises `UnreadableImage` for what Pillow raises meanwhile."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=tuple(FORMATS)) as image:
            yield image
    except (UnreadableImage, MixedSizes):
        raise
    except UnidentifiedImageError as error:
        what = "it is empty" if not data else f"it is damaged, or none of {', '.join(FORMATS)}"
        raise UnreadableImage(f"not a readable image: {what}") from error
    except Exception as error:  # noqa: BLE001 - the border to Pillow, which raises errors of any kind for damaged bytes
        reason = make_printable(f"{type(error).__name__}: {error}")[:MAX_REASON]
        raise UnreadableImage(f"not a readable image, its {len(data)} bytes are damaged ({reason})") from error


def _turn_upright(image: Image.Image) -> tuple[Image.Image, list[str], bool]:
    """Return an open image as gray or sRGB, upright, what was converted, and whether it was turned."""
    if image.width * image.height > MAX_PIXELS:
        raise UnreadableImage(f"{image.width}x{image.height} are more than {MAX_PIXELS} pixels")
    converted, remarks = to_gray_or_rgb(image)
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    frames = ["several frames, the first is used"] if getattr(image, "is_animated", False) else []
    method = UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    upright = converted if method is None else converted.transpose(method)
    return upright, [*frames, *remarks], method is not None


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


def tile_pixels(
    images: UInt8[np.ndarray, "batch tile_height tile_width channel"], columns: int, gap: int = 1
) -> Pixels:
    """Arrange images in reading order, `gap` white pixels apart; empty cells are black.

    Raises `ValueError` without images or columns.
    """
    if not len(images) or columns < 1:
        raise ValueError(
            f"a grid needs an image and a column; got {len(images)} images, {columns} columns; pass at least one each"
        )
    count, height, width, channels = images.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    table = np.zeros((rows * columns, height + gap, width + gap, channels), np.uint8)
    table[:count, :height, :width] = images
    table[:, height:] = table[:, :, width:] = 255
    canvas = table.reshape(rows, columns, height + gap, width + gap, channels).transpose(0, 2, 1, 3, 4)
    canvas = canvas.reshape(rows * (height + gap), columns * (width + gap), channels)
    return canvas[: len(canvas) - gap, : canvas.shape[1] - gap]


def fit_image(pixels: Pixels, config: DataConfig, key: str) -> Fitted:
    """Convert an image to the configured channels and to the size of the nearest aspect ratio.

    Raises `MixedSizes` if scaling is not allowed.
    """
    size = _nearest_size(pixels.shape[1], pixels.shape[0], config)
    if pixels.shape == (*size, config.channels):
        return pixels
    return to_pixels(_fit(to_image(pixels), config, key))


def _nearest_size(width: int, height: int, config: DataConfig) -> tuple[int, int]:
    """Return the (height, width) of the nearest aspect ratio."""
    ratio = math.log(width / height)
    return min(config.sizes, key=lambda size: abs(math.log(size[1] / size[0]) - ratio))


def _fit(image: Image.Image, config: DataConfig, key: str) -> Image.Image:
    height, width = _nearest_size(image.width, image.height, config)
    if image.size != (width, height) and config.fit == "exact":
        raise MixedSizes(
            f"{key} is {image.width}x{image.height}, but with data.fit=exact every image must be "
            f"{width}x{height}; set data.fit=crop, or data.image_size to the common size of all images"
        )
    if image.size != (width, height) and config.fit == "pad":
        image = ImageOps.pad(image, (width, height), Image.Resampling.LANCZOS, color="white")
    elif image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    mode = "L" if config.channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def is_enlarged(pixels: Pixels, fitted: Fitted, config: DataConfig) -> bool:
    """Return whether an image was scaled up to the size that it was fitted to."""
    scales = [float(new / old) for new, old in zip(fitted.shape[:2], pixels.shape[:2], strict=True)]
    return (min(scales) if config.fit == "pad" else max(scales)) > 1


def crop_to(pixels: Pixels, height: int, width: int) -> Fitted:
    """Return the middle of an image at another size."""
    if pixels.shape[:2] == (height, width):
        return pixels
    return to_pixels(ImageOps.fit(to_image(pixels), (width, height), Image.Resampling.LANCZOS))
