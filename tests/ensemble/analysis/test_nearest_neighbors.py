"""Nearest training images, against all distances written out."""

import numpy as np
import pytest

from data_partition.features.pixels import flat
from data_partition.shards.shards import Sample, ShardWriter
from ensemble.analysis import nearest_neighbors as nearest
from ensemble.analysis.nearest_neighbors import find_nearest, read_rows


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


def test_it_is_the_nearest_of_all_whatever_the_chunks(images, shards, monkeypatch):
    monkeypatch.setattr(nearest, "CHUNK", 7)
    queries = np.random.default_rng(1).integers(0, 256, (30, 4, 4, 1), dtype=np.uint8)
    seen = []
    found = find_nearest(queries, {"pixels": flat, "dark": lambda batch: -flat(batch)}, shards, seen.append)
    distances = np.linalg.norm(flat(queries)[:, None] - flat(images), axis=2)
    for space in ("pixels", "dark"):
        np.testing.assert_allclose(found[space].distances, distances.min(1), rtol=1e-5)
        np.testing.assert_array_equal(found[space].rows, distances.argmin(1))
    assert seen == [7, 14, 21, 28, 35, 42, 49, 50]


def test_a_copy_is_at_distance_zero(images, shards):
    found = find_nearest(images[[9, 3]], {"pixels": flat}, shards, lambda done: None)["pixels"]
    assert found.distances.tolist() == [0, 0] and found.rows.tolist() == [9, 3]


def test_rows_come_in_the_order_asked_for_also_twice(images, shards):
    read = read_rows(shards, np.array([20, 3, 20]))
    assert [sample.key for sample in read] == ["image-20", "image-03", "image-20"]
    np.testing.assert_array_equal(read[1].image, images[3])
