"""Planted duplicates are found, and other pictures are not."""

import io
from itertools import chain

import numpy as np
import pytest
from PIL import Image

from data_partition.config import DataConfig
from data_partition.datasets import near_pairs
from data_partition.datasets.duplicates import (
    REPEATED,
    find_duplicates,
    find_repeated,
    leave_out_repeated,
    mark_repeated,
)
from data_partition.datasets.near_pairs import CANDIDATES
from data_partition.datasets.source import Reading, Source
from data_partition.datasets.sources import SOURCES
from data_partition.shards.shards import Sample
from ddm_core.artifacts import Workspace

PLANTED = 16


def crop(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cut up to 4 % off each edge, and scale to the same size."""
    left, top, right, bottom = rng.uniform(0, 0.04, 4) * len(image)
    box = (left, top, len(image) - right, len(image) - bottom)
    return np.asarray(Image.fromarray(image).resize(image.shape[:2], Image.Resampling.BICUBIC, box))


def compress(image: np.ndarray, _rng: np.random.Generator) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=75)
    return np.asarray(Image.open(file))


def mirror(image: np.ndarray, _rng: np.random.Generator) -> np.ndarray:
    return image[:, ::-1]


CHANGES = {
    "none": lambda image, _rng: image,
    "mirror": mirror,
    "crop": crop,
    "jpeg": compress,
    "all": lambda image, rng: compress(mirror(crop(image, rng), rng), rng),
}


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """Return random scenes of ten ellipses, which differ from each other."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:64, 0:64] / 64
    scenes = []
    for _ in range(80):
        scene = np.ones((64, 64, 3)) * rng.uniform(0, 255, 3)
        for _ in range(10):
            (cx, cy), (a, b) = rng.uniform(0, 1, 2), rng.uniform(0.05, 0.3, 2)
            scene[((x - cx) / a) ** 2 + ((y - cy) / b) ** 2 < 1] = rng.uniform(0, 255, 3)
        scenes.append(scene.astype(np.uint8))
    return np.stack(scenes)


def test_planted_duplicates_are_found_and_no_others(pictures: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    originals = [(change, row) for change in CHANGES.values() for row in rng.choice(len(pictures), PLANTED, False)]
    planted = [change(pictures[row], rng) for change, row in originals]
    found = {one.row: one.original for one in find_duplicates([*pictures, *planted])}
    right = [found.get(len(pictures) + index) == row for index, (_, row) in enumerate(originals)]
    assert np.mean(right) >= 0.99
    assert not [row for row in found if row < len(pictures)]


def test_first_of_several_is_the_original(pictures: np.ndarray) -> None:
    first, second = pictures[:2]
    found = find_duplicates([first, second, first[:, ::-1], first, second])
    assert [(one.row, one.original, one.residual) for one in found] == [(2, 0, 0.0), (3, 0, 0.0), (4, 1, 0.0)]


def test_more_copies_than_candidates_are_all_found(pictures: np.ndarray) -> None:
    rng = np.random.default_rng(2)
    copies = [CHANGES["all" if number % 2 else "crop"](pictures[3], rng) for number in range(3 * CANDIDATES)]
    found = find_duplicates([*pictures[:6], *copies])
    assert [(one.row, one.original) for one in found] == [(6 + number, 3) for number in range(len(copies))]


def test_cells_find_what_a_scan_of_all_pairs_finds(pictures: np.ndarray, monkeypatch) -> None:
    rng = np.random.default_rng(3)
    images = [*pictures, *(CHANGES["all"](pictures[row], rng) for row in range(30))]
    whole = find_duplicates(images)
    monkeypatch.setattr(near_pairs, "CELL_ROWS", 10)
    monkeypatch.setattr(near_pairs, "PROBES", 3)
    monkeypatch.setattr(near_pairs, "PIECE", 25)
    assert {(one.row, one.original) for one in find_duplicates(images)} == {(one.row, one.original) for one in whole}
    assert len(whole) == 30


def test_a_crop_is_found_in_either_direction(pictures: np.ndarray) -> None:
    smaller = np.asarray(Image.fromarray(pictures[5]).crop((5, 5, 64, 64)).resize((64, 64), Image.Resampling.BICUBIC))
    for images in ([pictures[5], smaller, *pictures[6:40]], [smaller, pictures[5], *pictures[6:40]]):
        assert [(one.row, one.original) for one in find_duplicates(images)] == [(1, 0)]


def test_pictures_of_several_sizes_are_compared(pictures: np.ndarray, tmp_path, monkeypatch) -> None:
    images = [pictures[0], pictures[1][:40], pictures[0], pictures[1][:40, ::-1], pictures[2][:, :40]]
    train = [Sample(key=f"t{row}", image=image, label=0) for row, image in enumerate(images)]
    source = Source(class_names=(), train=Reading.whole(lambda: train), test=None)
    monkeypatch.setitem(SOURCES, "image_folder", lambda config: source)
    config = DataConfig(
        source="image_folder",
        path=".",
        image_size=32,
        channels=3,
        fit="crop",
        duplicates="remove",
        aspect_buckets=("32x20",),
    )
    assert find_repeated(source, config, Workspace.at(tmp_path)) == {"t2": "t0", "t3": "t1"}


def test_source_leaves_out_what_repeats(pictures: np.ndarray, tmp_path, monkeypatch) -> None:
    images = [pictures[0], pictures[1], pictures[0], pictures[2], pictures[3]]
    train = [Sample(key=f"t{row}", image=image, label=0) for row, image in enumerate(images)]
    test = [Sample(key="h0", image=pictures[1][:, ::-1], label=0), Sample(key="h1", image=pictures[4], label=0)]
    source = Source(class_names=(), train=Reading.whole(lambda: train), test=Reading.whole(lambda: test))
    monkeypatch.setitem(SOURCES, "image_folder", lambda config: source)
    config = DataConfig(source="image_folder", path=".", image_size=64, channels=3, duplicates="remove", limit=4)
    repeated = find_repeated(source, config, Workspace.at(tmp_path))
    filtered = chain(leave_out_repeated(train, source, config, repeated), mark_repeated(test, repeated))
    kept = {one.key: getattr(one, "reason", "") for one in filtered}
    assert kept == {"t0": "", "t1": "", "t2": REPEATED, "t3": "", "h0": REPEATED, "h1": ""}


def test_images_without_anything_alike_are_no_duplicates() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (4, 24, 24, 3), dtype=np.uint8)
    assert find_duplicates(noise) == []
