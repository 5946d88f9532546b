import io

import numpy as np
import pytest
import torch
from PIL import Image

from ensemble.sampling.images import encode_png, image_grid, to_bytes


def test_to_bytes_rounds_and_clips() -> None:
    images = torch.tensor([-1.0, 0.0, 0.499 / 255, 0.501 / 255, 1.0, 2.0]).reshape(1, 1, 6, 1)
    assert to_bytes(images).ravel().tolist() == [0, 0, 0, 1, 255, 255]


def test_to_bytes_inverts_division_by_255() -> None:
    stored = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    assert np.array_equal(to_bytes(torch.from_numpy(stored).float() / 255), stored)


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_places_images_in_reading_order(channels: int) -> None:
    images = (torch.arange(5.0) / 255).reshape(5, 1, 1, 1).expand(5, 2, 3, channels)
    table = np.asarray(image_grid(images, columns=3, gap=0)).reshape(4, 9, channels)
    assert table[::2, ::3, 0].tolist() == [[0, 1, 2], [3, 4, 0]]


def test_grid_is_no_wider_than_its_images() -> None:
    assert image_grid(torch.zeros(2, 4, 4, 1), columns=8, gap=0).size == (8, 4)


def test_grid_gap_is_between_images_only() -> None:
    table = np.asarray(image_grid(torch.zeros(4, 2, 2, 1), columns=2, gap=1))
    assert table.tolist() == [[0, 0, 255, 0, 0]] * 2 + [[255] * 5] + [[0, 0, 255, 0, 0]] * 2


@pytest.mark.parametrize(("count", "columns"), [(0, 3), (3, 0)])
def test_grid_without_images_or_columns_raises(count: int, columns: int) -> None:
    with pytest.raises(ValueError, match="a grid needs"):
        image_grid(torch.zeros(count, 2, 2, 1), columns)


def test_png_is_lossless_and_deterministic() -> None:
    image = image_grid(torch.rand(4, 5, 5, 3, generator=torch.Generator().manual_seed(0)))
    assert encode_png(image) == encode_png(image)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(image)))), np.asarray(image))
