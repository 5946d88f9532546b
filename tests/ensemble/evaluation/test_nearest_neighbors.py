"""Nearest training images against the full distance matrix."""

import numpy as np
import pytest

from data_partition.features.pixels import flatten_pixels
from data_partition.shards.shards import Sample, ShardWriter
from ensemble.evaluation import nearest_neighbors as nearest
from ensemble.evaluation.nearest_neighbors import find_nearest, read_rows


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (50, 4, 4, 1), dtype=np.uint8)


@pytest.fixture
def shards(tmp_path, images):
    writer = ShardWriter(tmp_path / "train", 16)
    for number, image in enumerate(images):
        writer.add(Sample(key=f"image-{number:02d}", image=image))
    writer.close()
    return tmp_path / "train"


def test_nearest_neighbors_do_not_depend_on_chunks(images, shards, monkeypatch):
    monkeypatch.setattr(nearest, "CHUNK", 7)
    queries = np.random.default_rng(1).integers(0, 256, (30, 4, 4, 1), dtype=np.uint8)
    reports = []
    spaces = {"pixels": flatten_pixels, "dark": lambda batch: -flatten_pixels(batch)}
    neighbors = find_nearest(queries, spaces, shards, reports.append)
    distances = np.linalg.norm(flatten_pixels(queries)[:, None] - flatten_pixels(images), axis=2)
    for space in ("pixels", "dark"):
        np.testing.assert_allclose(neighbors[space].distances, distances.min(1), rtol=1e-5)
        np.testing.assert_array_equal(neighbors[space].rows, distances.argmin(1))
    assert reports == [7, 14, 21, 28, 35, 42, 49, 50]


def test_copy_has_distance_zero(images, shards):
    neighbors = find_nearest(images[[9, 3]], {"pixels": flatten_pixels}, shards, lambda done: None)["pixels"]
    assert neighbors.distances.tolist() == [0, 0] and neighbors.rows.tolist() == [9, 3]


def test_read_rows_keeps_order_and_duplicates(images, shards):
    read = read_rows(shards, np.array([20, 3, 20]))
    assert [sample.key for sample in read] == ["image-20", "image-03", "image-20"]
    np.testing.assert_array_equal(read[1].image, images[3])
