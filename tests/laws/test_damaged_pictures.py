"""Whatever a damaged picture makes Pillow raise becomes one `UnreadableImage` in plain words."""

import io
import struct
import traceback
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data_partition.errors import UnreadableImage
from data_partition.shards.images import FORMATS, decode_image
from tests.data_partition.shards.test_color import P3

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8))
MODES = {
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
    "TIFF": ["L", "CMYK", "I;16", "F", "RGBA"],
    "GIF": ["P", "L"],
}


def encode_formats() -> dict[str, bytes]:
    """Encode a picture in every format that Pillow writes, also those that are refused, with EXIF and profile."""
    Image.init()
    exif = Image.Exif()
    exif[0x0112] = 6
    encoded = {}
    for kind in sorted(set(Image.SAVE) - {"PDF", "EPS", "BUFR", "GRIB", "HDF5", "WMF"}):
        for mode in MODES.get(kind, ["RGB", "L", "1"]):
            source = PICTURE.convert("L").convert("F") if mode == "F" else PICTURE
            image = Image.new("I;16", (12, 10), 40000) if mode == "I;16" else source.convert(mode)
            extra = {"exif": exif, "icc_profile": P3} if kind in ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "MPO") else {}
            buffer = io.BytesIO()
            try:
                image.save(buffer, format=kind, **extra)
            except (OSError, ValueError, KeyError):
                continue
            encoded[f"{kind} {mode}"] = buffer.getvalue()
    return encoded


ENCODED = encode_formats()


def decode_or_refuse(data: bytes) -> bool:
    """Return whether the image is readable; fail if a refusal is not in plain words, or an error of our own code."""
    with warnings.catch_warnings(action="error"):
        try:
            pixels = decode_image(data)
        except UnreadableImage as error:
            assert str(error).isprintable() and " at 0x" not in str(error) and len(str(error)) < 400
            if error.__cause__ is not None:
                origin = traceback.extract_tb(error.__cause__.__traceback__)[-1].filename
                assert "data_partition" not in origin, error
            return False
    assert pixels.dtype == np.uint8 and pixels.ndim == 3
    return True


def test_every_supported_format_is_among_the_encoded_ones():
    assert set(FORMATS) <= {name.split()[0] for name in ENCODED}
    readable = {name.split()[0] for name, data in ENCODED.items() if decode_or_refuse(data)}
    assert readable == {*FORMATS, "MPO"}


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(ENCODED)), st.data())
def test_mutated_bytes_of_every_format(name: str, data: st.DataObject):
    content = bytearray(ENCODED[name])
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[place] = data.draw(st.integers(0, 255))
        else:
            content[place : place + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
        content = content or bytearray(1)
    decode_or_refuse(bytes(content))


def jpeg_with_exif(payload: bytes) -> bytes:
    buffer = io.BytesIO()
    PICTURE.save(buffer, format="JPEG", exif=b"Exif\0\0" + payload)
    return buffer.getvalue()


TAGS = st.one_of(st.sampled_from([0x0112, 0x8769, 0x8825, 0xA005, 0x927C, 0x0201, 0x014A]), st.integers(0, 0xFFFF))


@settings(max_examples=500, deadline=None)
@given(
    st.sampled_from(["<", ">"]),
    st.lists(
        st.tuples(TAGS, st.integers(0, 20), st.sampled_from([0, 1, 2, 8, 2**31]), st.binary(min_size=4, max_size=4))
    ),
    st.binary(max_size=60),
)
def test_odd_exif_tags_beside_an_orientation(order: str, tags: list[tuple[int, int, int, bytes]], rest: bytes):
    entries = struct.pack(f"{order}HHIHH", 0x0112, 3, 1, 6, 0)
    entries += b"".join(struct.pack(f"{order}HHI", tag, kind, count) + value for tag, kind, count, value in tags)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags) + 1)
    decode_or_refuse(jpeg_with_exif(head + entries + bytes(4) + rest))


@pytest.mark.parametrize("orientation", range(9))
def test_orientation_is_applied_like_pillow_does(orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    PICTURE.save(buffer, format="PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(buffer.getvalue())))
    np.testing.assert_array_equal(decode_image(buffer.getvalue()), np.asarray(expected))
