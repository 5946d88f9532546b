import io
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from data_partition.config import DataConfig
from data_partition.errors import MixedSizes, UnreadableImage
from data_partition.shards import images
from data_partition.shards.images import decode_fitted, decode_image, encode_png, fit_image, is_enlarged


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


def test_padding_keeps_the_whole_image_on_white():
    dark = np.zeros((4, 8, 3), dtype=np.uint8)
    padded = fit_image(dark, DataConfig(image_size=8, channels=3, fit="pad"), "k")
    np.testing.assert_array_equal(padded[2:6], np.zeros((4, 8, 3)))
    np.testing.assert_array_equal(padded[[0, 1, 6, 7]], np.full((4, 8, 3), 255))


@pytest.mark.parametrize(
    ("shape", "expected"), [((8, 8), (8, 8)), ((9, 8), (8, 8)), ((30, 60), (4, 8)), ((9, 5), (8, 4))]
)
def test_an_image_gets_the_size_of_the_nearest_aspect_ratio(shape: tuple[int, int], expected: tuple[int, int]):
    config = DataConfig(image_size=8, fit="crop", aspect_buckets=("8x4", "4x8"))
    assert fit_image(np.zeros((*shape, 1), np.uint8), config, "k").shape[:2] == expected


@pytest.mark.parametrize(("fit", "enlarged"), [("crop", True), ("pad", False)])
def test_images_that_are_scaled_up_are_known(fit: Literal["crop", "pad"], enlarged: bool):
    config, pixels = DataConfig(image_size=8, fit=fit), np.zeros((6, 16, 1), np.uint8)
    assert is_enlarged(pixels, fit_image(pixels, config, "k"), config) == enlarged


def test_buckets_are_sizes_of_their_own_and_need_scaling():
    with pytest.raises(ValueError, match="needs data.fit=crop or data.fit=pad"):
        DataConfig(image_size=8, aspect_buckets=("8x4",))
    for buckets in (("8x8",), ("8x4", "8x4"), ("8x2",)):
        with pytest.raises(ValueError, match="different sizes beside 8x8, of sides of 4"):
            DataConfig(image_size=8, fit="crop", aspect_buckets=buckets)


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_what_is_fitted_while_it_is_decoded_is_the_same(
    mode: str, channels: Literal[1, 3], fit: Literal["crop", "pad"]
):
    pixels = np.random.default_rng(0).integers(0, 256, (13, 9, 3), np.uint8)
    exif = Image.Exif()
    exif[274] = 6
    for size, kept in (((9, 13), None), ((8, 8), None), ((9, 13), exif)):
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize(size).convert(mode).save(buffer, "PNG", **({"exif": kept} if kept else {}))
        config = DataConfig(image_size=8, channels=channels, fit=fit, aspect_buckets=("12x8",))
        fitted = decode_fitted(buffer.getvalue(), config, "a")
        np.testing.assert_array_equal(fitted, fit_image(decode_image(buffer.getvalue()), config, "a"))


def test_errors_of_both_keep_their_kind():
    config = DataConfig(image_size=8, channels=3)
    with pytest.raises(MixedSizes, match="a is 9x8, but with data.fit=exact"):
        decode_fitted(encode_file(Image.new("RGB", (9, 8))), config, "a")
    with pytest.raises(UnreadableImage, match="damaged"):
        decode_fitted(encode_file(Image.new("RGB", (64, 64)))[:60], config, "a")
