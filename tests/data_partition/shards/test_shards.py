import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_partition.errors import ShardError
from data_partition.shards.shards import Sample, ShardWriter, read_batches, read_encoded, read_index, read_samples
from ddm_core.artifacts import read_with_checksum, with_checksum, write_text
from tests.data_partition.conftest import make_sample, read_files, write_samples


def test_shards_round_trip(tmp_path: Path):
    written = write_samples(tmp_path, 10)
    for before, after in zip(written, read_samples(tmp_path), strict=True):
        assert (before.key, before.label, before.caption) == (after.key, after.label, after.caption)
        np.testing.assert_array_equal(before.image, after.image)
    index = read_index(tmp_path)
    assert (index.count, index.image_shape, index.class_names) == (10, (6, 6, 1), ("a", "b", "c"))
    assert index.shard_counts == (4, 4, 2)


def test_color_sample_without_class_and_caption(tmp_path: Path):
    writer = ShardWriter(tmp_path, 2)
    writer.add(Sample(key="only", image=make_sample(1, channels=3).image))
    writer.close()
    (only,) = read_samples(tmp_path)
    assert (only.label, only.caption, only.image.shape) == (-1, "", (6, 6, 3))
    with tarfile.open(tmp_path / "shard-00000.tar") as tar:
        assert tar.getnames() == ["only.png"]


def test_shards_are_deterministic(tmp_path: Path):
    write_samples(tmp_path / "first", 9)
    write_samples(tmp_path / "second", 9)
    assert read_files(tmp_path / "first") == read_files(tmp_path / "second")


@pytest.mark.parametrize("start", [0, 1, 4, 6, 9, 10])
def test_reading_can_start_anywhere(tmp_path: Path, start: int):
    written = write_samples(tmp_path, 10)
    keys = [key for batch in read_batches(tmp_path, 3, start=start) for key in batch.keys]
    assert keys == [sample.key for sample in written[start:]]


def test_shards_before_the_start_are_not_opened(tmp_path: Path):
    write_samples(tmp_path, 10)
    (tmp_path / "shard-00000.tar").write_bytes(b"broken")
    assert len(list(read_encoded(tmp_path, start=4))) == 6


def test_batches_stack_images_and_labels(tmp_path: Path):
    write_samples(tmp_path, 5)
    sizes = [batch.images.shape for batch in read_batches(tmp_path, 2)]
    assert sizes == [(2, 6, 6, 1), (2, 6, 6, 1), (1, 6, 6, 1)]
    assert [label for batch in read_batches(tmp_path, 2) for label in batch.labels] == [0, 1, 2, 0, 1]


def test_empty_folder_has_an_index(tmp_path: Path):
    ShardWriter(tmp_path, 4, image_shape=(8, 8, 1)).close()
    assert read_index(tmp_path).image_shape == (8, 8, 1)
    assert list(read_batches(tmp_path, 4)) == []


def test_add_of_other_shape_raises(tmp_path: Path):
    writer = ShardWriter(tmp_path, 4)
    writer.add(make_sample(0))
    with pytest.raises(ValueError, match="sample-00001 has shape"):
        writer.add(make_sample(1, side=7))


@pytest.mark.parametrize("keep", [0, 100, 512, 1024, 3000, 5 * 512])
def test_truncated_shard_error_names_the_shard(tmp_path: Path, keep: int):
    write_samples(tmp_path, 4)
    path = tmp_path / "shard-00000.tar"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ShardError, match="shard-00000.tar"):
        list(read_samples(tmp_path))


def test_every_corrupt_header_error_names_the_shard(tmp_path: Path):
    write_samples(tmp_path, 4)
    path = tmp_path / "shard-00000.tar"
    intact = path.read_bytes()
    for block in range(0, 12 * 1024, 1024):
        path.write_bytes(intact[:block] + b"\xff" * 20 + intact[block + 20 :])
        with pytest.raises(ShardError, match="shard-00000.tar"):
            list(read_samples(tmp_path))


def test_missing_shard_or_index_raises(tmp_path: Path):
    write_samples(tmp_path, 10)
    (tmp_path / "shard-00001.tar").unlink()
    with pytest.raises(ShardError, match=r"shard-00001\.tar is missing; make"):
        list(read_samples(tmp_path))
    with pytest.raises(ShardError, match="not a folder of shards"):
        read_index(tmp_path / "elsewhere")


def test_index_with_files_outside_the_folder_raises(tmp_path: Path):
    write_samples(tmp_path, 3)
    index = read_with_checksum(tmp_path / "index.json") | {"shards": ["../../etc/passwd"]}
    write_text(tmp_path / "index.json", with_checksum(index))
    with pytest.raises(ShardError, match="names other files"):
        read_index(tmp_path)
