"""Pixels never change silently: each is scaled by its range and shown in sRGB, or the image is refused by name."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from data_partition.errors import UnreadableImage
from data_partition.shards.images import decode_image, decode_with_remarks
from tests.data_partition.shards.test_images import encode_file

RAMP = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
EIGHT_BITS = np.arange(256, dtype=np.uint8).reshape(16, 16)


def encode(array: np.ndarray, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format=kind, **options)
    return buffer.getvalue()


def make_png(bits: int, color: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG of 4 x 1 pixels; Pillow cannot write every bit depth."""
    header = struct.pack(">IIBBBBB", 4, 1, bits, color, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" + rows)), (b"IEND", b"")]
    body = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def make_tiff(bits: int, photometric: int, strip: bytes, side: tuple[int, int]) -> bytes:
    """Return an uncompressed gray TIFF; Pillow writes neither 12 bits nor white as zero."""
    entries = [(256, 3, side[0]), (257, 3, side[1]), (258, 3, bits), (259, 3, 1), (262, 3, photometric)]
    entries += [(273, 4, 8), (277, 3, 1), (278, 3, side[1]), (279, 4, len(strip))]
    table = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + struct.pack("<H", len(entries)) + table + bytes(4)


@pytest.mark.parametrize(
    "data",
    [
        encode(RAMP, "PNG"),
        encode(RAMP, "TIFF"),
        encode(RAMP, "TIFF", compression="tiff_lzw"),
        encode(RAMP.astype(">u2"), "TIFF"),
        encode(RAMP, "PPM"),
        b"P5\n16 16\n4095\n" + (RAMP.astype(np.uint32) * 4095 // 65535).astype(">u2").tobytes(),
        encode((RAMP / 65535).astype(np.float32), "TIFF"),
        make_tiff(16, 1, RAMP.tobytes(), (16, 16)),
        make_tiff(16, 0, (65535 - RAMP).tobytes(), (16, 16)),
    ],
)
def test_deep_pixels_are_scaled_by_their_range(data: bytes):
    decoded = decode_with_remarks(data)
    assert np.abs(decoded.pixels[:, :, 0].astype(int) - EIGHT_BITS).max() <= 1
    assert decoded.remarks == ("more than 8 bits a channel, scaled to 8",)


def test_twelve_bits_of_a_tiff_are_scaled():
    packed = bytes.fromhex("000 fff 800 7ff".replace(" ", ""))
    assert decode_image(make_tiff(12, 1, packed, (4, 1)))[0, :, 0].tolist() == [0, 255, 128, 127]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encode(RAMP.astype(np.int32), "TIFF"), "integer pixels have no known range"),
        (encode(RAMP.astype(np.float32), "TIFF"), "not all from 0 to 1"),
        (encode(np.full((4, 4), np.nan, np.float32), "TIFF"), "not all from 0 to 1"),
        (encode(np.full((4, 4), -0.1, np.float32), "TIFF"), "not all from 0 to 1"),
        (encode_file(Image.new("LAB", (2, 2)), "TIFF"), "colour model LAB"),
        (make_png(16, 2, bytes(24), (b"tRNS", bytes(6))), "16-bit colours of which one is transparent"),
    ],
)
def test_pixels_without_a_known_range_are_refused(data: bytes, reason: str):
    with pytest.raises(UnreadableImage, match=reason):
        decode_image(data)


@pytest.mark.parametrize(
    ("bits", "rows", "levels"),
    [
        (1, b"\x50", [255, 255, 0, 255]),
        (2, b"\x1b", [0, 85, 255, 255]),
        (4, bytes([0x01, 0x2F]), [0, 17, 255, 255]),
        (8, bytes([0, 1, 2, 255]), [0, 1, 255, 255]),
        (16, struct.pack(">4H", 0, 257, 2, 65535), [0, 1, 255, 255]),
    ],
)
def test_transparent_gray_becomes_white_at_every_bit_depth(bits: int, rows: bytes, levels: list[int]):
    transparent = 0 if bits == 1 else 2
    data = make_png(bits, 0, rows, (b"tRNS", struct.pack(">H", transparent)))
    expected = [255] * 4 if bits == 1 else levels
    assert decode_image(data)[0].tolist() == [[level] * 3 for level in expected]


def test_neighbour_of_a_transparent_sixteen_bit_value_stays():
    data = make_png(16, 0, struct.pack(">4H", 512, 513, 0, 65535), (b"tRNS", struct.pack(">H", 512)))
    assert decode_image(data)[0, :, 0].tolist() == [255, 2, 0, 255]


def test_transparent_palette_and_color_become_white():
    palette = make_png(8, 3, bytes([0, 1, 1, 0]), (b"PLTE", bytes([9, 9, 9, 50, 60, 70])), (b"tRNS", b"\0"))
    color = make_png(8, 2, bytes([9, 9, 9, 50, 60, 70] * 2), (b"tRNS", struct.pack(">3H", 9, 9, 9)))
    assert decode_image(palette)[0].tolist() == [[255] * 3, [50, 60, 70], [50, 60, 70], [255] * 3]
    assert decode_image(color)[0].tolist() == [[255] * 3, [50, 60, 70]] * 2


def make_profile(space: bytes, gamma: float) -> bytes:
    """Return a small colour profile: Display P3's primaries, or gray."""

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = {b"wtpt": xyz(0.9642, 1, 0.8249), b"cprt": b"text\0\0\0\0none\0\0\0\0"}
    tags |= {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 2) + b"P\0" + bytes(78)}
    if space == b"GRAY":
        tags |= {b"kTRC": curve}
    else:
        tags |= {b"rXYZ": xyz(0.5151, 0.2412, -0.0011), b"gXYZ": xyz(0.292, 0.6922, 0.0419)}
        tags |= {b"bXYZ": xyz(0.1571, 0.0666, 0.7841), b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    table, data, place = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        table += name + struct.pack(">II", place + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    head = struct.pack(
        ">I4sI4s4s4s12s4s", 128 + len(table) + len(data), b"", 0x2400000, b"mntr", space, b"XYZ ", b"", b"acsp"
    )
    return head.ljust(68, b"\0") + struct.pack(">iii", 63190, 65536, 54061) + bytes(48) + table + data


P3 = make_profile(b"RGB ", 2.2)
GREEN = np.full((4, 4, 3), (90, 200, 90), np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "AVIF"])
def test_colors_of_a_profile_become_those_of_srgb(kind: str):
    lossless = (
        {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": "4:4:4"} if kind == "AVIF" else {}
    )
    data = encode(GREEN, kind, icc_profile=P3, **lossless)
    image = Image.open(io.BytesIO(data))
    source = ImageCms.ImageCmsProfile(io.BytesIO(P3))
    shown = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"))
    assert shown is not None
    decoded = decode_with_remarks(data)
    np.testing.assert_array_equal(decoded.pixels, np.asarray(shown))
    assert decoded.remarks == ("a colour profile, converted to sRGB",)
    assert abs(int(decoded.pixels[0, 0, 0]) - 90) > 50


def test_profile_of_srgb_changes_nothing():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    decoded = decode_with_remarks(encode(GREEN, "PNG", icc_profile=srgb))
    np.testing.assert_array_equal(decoded.pixels, GREEN)
    assert decoded.remarks == ()


def test_gray_profile_keeps_one_channel_and_changes_levels():
    pixels = decode_image(encode(EIGHT_BITS, "PNG", icc_profile=make_profile(b"GRAY", 1.0)))
    assert pixels.shape == (16, 16, 1) and pixels[8, 0, 0] > 180


def test_profile_applies_below_transparency_and_to_palettes():
    rgba = np.dstack([GREEN, np.full((4, 4, 1), 255, np.uint8)])
    palette = Image.fromarray(GREEN).quantize(2)
    expected = decode_image(encode(GREEN, "PNG", icc_profile=P3))
    np.testing.assert_array_equal(decode_image(encode(rgba, "PNG", icc_profile=P3)), expected)
    buffer = io.BytesIO()
    palette.save(buffer, format="PNG", icc_profile=P3)
    np.testing.assert_array_equal(decode_image(buffer.getvalue()), expected)


@pytest.mark.parametrize("profile", [b"no profile", P3[:200], make_profile(b"GRAY", 1.0)])
def test_unusable_profile_is_ignored_and_said(profile: bytes):
    decoded = decode_with_remarks(encode(GREEN, "PNG", icc_profile=profile))
    np.testing.assert_array_equal(decoded.pixels, GREEN)
    assert decoded.remarks == ("an unusable colour profile, ignored",)


def test_cmyk_is_converted_and_said():
    image = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    for kind in ("TIFF", "JPEG"):
        decoded = decode_with_remarks(encode_file(image, kind))
        assert decoded.pixels[0, 0, 0] > 220 and decoded.pixels[0, 0, 1:].max() < 40
        assert decoded.remarks == ("CMYK without a colour profile, converted by formula",)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_first_of_several_frames_is_used_and_said(kind: str):
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(buffer, format=kind, save_all=True, append_images=frames[1:])
    decoded = decode_with_remarks(buffer.getvalue())
    assert decoded.pixels[0, 0, 0] > 200
    assert decoded.remarks == ("several frames, the first is used",)
