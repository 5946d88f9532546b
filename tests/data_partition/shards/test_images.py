import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from data_partition.config import DataConfig
from data_partition.errors import MixedSizes, UnreadableImage
from data_partition.shards import images
from data_partition.shards.images import decode_image, encode_png, fit_image


def encode_file(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


@given(st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3])).flatmap(lambda s: arrays(np.uint8, s)))
def test_png_is_lossless(pixels: np.ndarray):
    np.testing.assert_array_equal(decode_image(encode_png(pixels)), pixels)


def test_transparency_becomes_white():
    pixels = decode_image(encode_file(Image.new("RGBA", (2, 2), (0, 0, 0, 0))))
    np.testing.assert_array_equal(pixels, np.full((2, 2, 3), 255))


@pytest.mark.parametrize(("mode", "channels"), [("1", 1), ("L", 1), ("LA", 3), ("P", 3), ("RGB", 3), ("CMYK", 3)])
def test_every_mode_becomes_gray_or_rgb(mode: str, channels: int):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    assert decode_image(encode_file(Image.new(mode, (3, 2)), kind)).shape == (2, 3, channels)


def test_sixteen_bits_keep_the_upper_eight():
    image = Image.fromarray(np.array([[0, 256, 65535]], dtype=np.uint16))
    assert decode_image(encode_file(image))[0, :, 0].tolist() == [0, 1, 255]


@pytest.mark.parametrize("data", [b"", b"not an image", encode_file(Image.new("L", (50, 50)))[:40]])
def test_broken_bytes_are_unreadable(data: bytes):
    with pytest.raises(UnreadableImage):
        decode_image(data)


@given(st.binary(max_size=300), st.integers(0, 200))
def test_damaged_image_raises_only_unreadable(inserted: bytes, position: int):
    data = encode_png(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    try:
        decode_image(data[:position] + inserted + data[position:])
    except UnreadableImage:
        return


def test_too_many_pixels_are_unreadable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 99)
    with pytest.raises(UnreadableImage, match="more than 99 pixels"):
        decode_image(encode_file(Image.new("L", (10, 10))))


def test_other_size_raises_or_is_cropped():
    wide = np.zeros((4, 8, 1), dtype=np.uint8)
    wide[:, 2:6] = 200
    with pytest.raises(MixedSizes, match="k is 8x4.*data.fit=crop"):
        fit_image(wide, DataConfig(image_size=4), "k")
    cropped = fit_image(wide, DataConfig(image_size=4, fit="crop"), "k")
    np.testing.assert_array_equal(cropped, np.full((4, 4, 1), 200))


def test_channels_are_converted():
    gray = np.full((4, 4, 1), 7, dtype=np.uint8)
    color = fit_image(gray, DataConfig(image_size=4, channels=3), "k")
    np.testing.assert_array_equal(color, np.full((4, 4, 3), 7))
    np.testing.assert_array_equal(fit_image(color, DataConfig(image_size=4), "k"), gray)
