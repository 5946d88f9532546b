"""Colours as a viewer shows them: gray or sRGB of 8 bits, on white; pixels without a known range are refused by name.

Pillow clips 16-bit, float and 32-bit pixels to 0 … 255, which gives black or white areas.
"""

import functools
import io

import numpy as np
from jaxtyping import Bool, Num
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin

from data_partition.errors import UnreadableImage

DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
PROFILE_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}
BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0
"""Two tags of TIFF, and the value of the second that means white."""

SRGB_TOLERANCE = 2
"""A profile that moves no colour by more is sRGB itself."""


def to_gray_or_rgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """Return an image as gray or sRGB, transparent areas white, and one remark for each lossy conversion.

    The image must not be loaded yet: a PNG's bit depth is lost then. Raises `UnreadableImage` for pixels without a
    known range and for colour models that are not read.
    """
    profile, bits = image.info.get("icc_profile"), _channel_bits(image)
    remarks = ["more than 8 bits a channel, scaled to 8"] if bits > 8 else []
    opaque, alpha = _split_alpha(image, bits)
    if profile:
        opaque, remark = _apply_profile(opaque, profile)
        remarks += [remark] if remark else []
    elif opaque.mode == "CMYK":
        remarks.append("CMYK without a colour profile, converted by formula")
    opaque = opaque if opaque.mode == "L" else opaque.convert("RGB")
    return opaque if alpha is None else _on_white(opaque.convert("RGB"), alpha), remarks


def _on_white(image: Image.Image, alpha: Image.Image) -> Image.Image:
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=alpha)
    return white


def _split_alpha(image: Image.Image, bits: int) -> tuple[Image.Image, Image.Image | None]:
    """Return an image as L, RGB or CMYK, and its opacity; None: opaque everywhere."""
    transparent = image.info.get("transparency")
    if image.mode in DEEP_MODES:
        values = np.asarray(image)
        return _scale(values, _full_scale(image, values, bits)), _opaque_where(values, transparent)
    if image.mode in ("1", "L"):
        gray = image.convert("L")
        level = transparent if transparent is None else transparent * 255 // (2**bits - 1)
        return gray, _opaque_where(np.asarray(gray), level)
    if image.mode == "RGB" and transparent is not None and bits == 16:
        raise UnreadableImage("16-bit colours of which one is transparent are not read; save it with an alpha channel")
    if image.mode not in ("LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"):
        raise UnreadableImage(f"the colour model {image.mode} is not read; convert it to RGB")
    if not image.has_transparency_data and image.mode not in ("La", "RGBa"):
        return (image if image.mode == "CMYK" else image.convert("RGB")), None
    straight = image.convert("LA") if image.mode == "La" else image
    rgba = straight.convert("RGBA")
    return rgba.convert("RGB"), rgba.getchannel("A")


def _opaque_where(values: Num[np.ndarray, "height width"], transparent: int | None) -> Image.Image | None:
    """Return the opacity of pixels of which one value is transparent (PNG's tRNS chunk)."""
    if transparent is None:
        return None
    opaque: Bool[np.ndarray, "height width"] = values != transparent
    return Image.fromarray(opaque.astype(np.uint8) * np.uint8(255))


def _scale(values: Num[np.ndarray, "height width"], full_scale: float) -> Image.Image:
    """Map 0 … `full_scale` to 0 … 255; a negative scale maps it to 255 … 0."""
    levels = np.rint(values.astype(np.float64) * (255 / abs(full_scale))).astype(np.uint8)
    return Image.fromarray(levels if full_scale > 0 else np.uint8(255) - levels)


def _full_scale(image: Image.Image, values: Num[np.ndarray, "height width"], bits: int) -> float:
    """Return the value of white, negative where 0 is white; raises `UnreadableImage` if the file does not tell."""
    sign = 1.0
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        sign = -1 if image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO else 1.0
    if image.mode == "F":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise UnreadableImage("its floating-point pixels are not all from 0 to 1; save it with 8 or 16 bits")
        return sign
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise UnreadableImage("its integer pixels have no known range; save it with 8 or 16 bits")
    return sign * float(2**bits - 1)


def _channel_bits(image: Image.Image) -> int:
    """Return the bits of a channel's value as Pillow hands it over; those of gray PNGs are the file's."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return int(max(image.tag_v2.get(BITS, (8,))))
    if image.mode in DEEP_MODES:
        return 16
    raw_mode = image.tile[0].args if isinstance(image, PngImagePlugin.PngImageFile) and image.tile else None
    bits = raw_mode.partition(";")[2].rstrip("B") if isinstance(raw_mode, str) else ""
    return 1 if raw_mode == "1" else int(bits) if bits.isdigit() else 8


def _apply_profile(image: Image.Image, profile: bytes) -> tuple[Image.Image, str]:
    """Convert an image from its colour profile to sRGB; return it with a remark, empty if nothing changed."""
    try:
        transform = _make_transform(profile, image.mode)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image, "an unusable colour profile, ignored"
    if transform is None:
        return image, ""
    shown = transform.apply(image)
    return shown.convert(image.mode) if image.mode == "L" else shown, "a colour profile, converted to sRGB"


@functools.lru_cache(maxsize=8)
def _make_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform from a profile to sRGB, None for sRGB itself; raises `ValueError` if it does not fit."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if source.profile.xcolor_space.strip() != PROFILE_SPACES[mode]:
        raise ValueError(f"a profile for {source.profile.xcolor_space} in an image of mode {mode}")
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode == "CMYK":
        return transform
    levels = np.stack(np.meshgrid(*[np.arange(0, 256, 51, dtype=np.uint8)] * 3), axis=-1).reshape(6, 36, 3)
    colors = Image.fromarray(levels if mode == "RGB" else levels[:, :, 0])
    change = np.asarray(transform.apply(colors)).astype(int) - np.asarray(colors.convert("RGB"))
    return transform if int(np.abs(change).max()) > SRGB_TOLERANCE else None
