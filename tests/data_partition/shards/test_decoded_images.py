from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from data_partition.errors import UnreadableImage
from data_partition.shards import decoded_images
from data_partition.shards.decoded_images import DecodedImages
from data_partition.shards.images import decode_with_remarks, encode_png

SIDE = 8


@pytest.fixture
def files():
    pixels = np.random.default_rng(0).integers(0, 256, (20, SIDE, SIDE, 3), dtype=np.uint8)
    return [encode_png(image) for image in pixels]


@pytest.fixture
def decoded(monkeypatch):
    """Return the files that are decoded."""
    files = []
    monkeypatch.setattr(
        decoded_images, "decode_with_remarks", lambda data: files.append(data) or decode_with_remarks(data)
    )
    return files


def test_second_pass_decodes_nothing(files, decoded):
    images = DecodedImages(10**6)
    passes = [[images.decode(data) for data in files] for _ in range(2)]
    assert decoded == files
    for first, second, data in zip(*passes, files, strict=True):
        assert first is second
        assert np.array_equal(first.pixels, decode_with_remarks(data).pixels)


def test_kept_images_are_bounded_and_the_oldest_leave(files, decoded):
    size = len(files[0]) + 3 * SIDE**2
    images = DecodedImages(3 * size + 20)
    for data in [*files[:3], files[0], *files[3:5]]:
        images.decode(data)
        assert images.kept_bytes <= images.max_bytes
    del decoded[:]
    for data in (files[4], files[3], files[0], files[1]):
        images.decode(data)
    assert decoded == [files[1]]


def test_pixels_cannot_be_changed(files):
    with pytest.raises(ValueError, match="read-only"):
        DecodedImages(10**6).decode(files[0]).pixels[0] = 0


def test_damaged_file_is_an_error_each_time(files):
    images = DecodedImages(10**6)
    for _ in range(2):
        with pytest.raises(UnreadableImage):
            images.decode(files[0][:40])
    assert images.kept_bytes == 0


def test_threads_share_images(files):
    images = DecodedImages(len(files) * (len(files[0]) + 3 * SIDE**2) // 2)
    with ThreadPoolExecutor(8) as threads:
        pixels = list(threads.map(lambda data: images.decode(data).pixels, files * 20))
    assert all(np.array_equal(pixels[i], decode_with_remarks(files[i % 20]).pixels) for i in range(len(pixels)))
    assert 0 < images.kept_bytes <= images.max_bytes
