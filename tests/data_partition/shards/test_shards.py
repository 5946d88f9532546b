import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_partition.errors import ShardError
from data_partition.shards.shards import Sample, ShardWriter, read_batches, read_encoded, read_index, read_samples
from ddm_core.artifacts import read_with_checksum, with_checksum, write_text
from tests.data_partition.conftest import files_of, sample, write_samples


def test_what_is_written_is_read(tmp_path: Path):
    written = write_samples(tmp_path, 10)
    for before, after in zip(written, read_samples(tmp_path), strict=True):
        assert (before.key, before.label, before.caption) == (after.key, after.label, after.caption)
        np.testing.assert_array_equal(before.image, after.image)
    index = read_index(tmp_path)
    assert (index.count, index.image_shape, index.class_names) == (10, (6, 6, 1), ("a", "b", "c"))
    assert index.shard_counts == (4, 4, 2)


def test_colour_no_class_and_no_caption(tmp_path: Path):
    writer = ShardWriter(tmp_path, 2)
    writer.add(Sample(key="only", image=sample(1, channels=3).image))
    writer.close()
    (found,) = read_samples(tmp_path)
    assert (found.label, found.caption, found.image.shape) == (-1, "", (6, 6, 3))
    with tarfile.open(tmp_path / "shard-00000.tar") as tar:
        assert tar.getnames() == ["only.png"]


def test_same_samples_same_bytes(tmp_path: Path):
    write_samples(tmp_path / "one", 9)
    write_samples(tmp_path / "two", 9)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


@pytest.mark.parametrize("start", [0, 1, 4, 6, 9, 10])
def test_reading_can_start_anywhere(tmp_path: Path, start: int):
    written = write_samples(tmp_path, 10)
    keys = [key for batch in read_batches(tmp_path, 3, start=start) for key in batch.keys]
    assert keys == [each.key for each in written[start:]]


def test_shards_before_the_start_are_not_opened(tmp_path: Path):
    write_samples(tmp_path, 10)
    (tmp_path / "shard-00000.tar").write_bytes(b"broken")
    assert len(list(read_encoded(tmp_path, start=4))) == 6


def test_batches_stack_images_and_labels(tmp_path: Path):
    write_samples(tmp_path, 5)
    sizes = [batch.images.shape for batch in read_batches(tmp_path, 2)]
    assert sizes == [(2, 6, 6, 1), (2, 6, 6, 1), (1, 6, 6, 1)]
    assert [label for batch in read_batches(tmp_path, 2) for label in batch.labels] == [0, 1, 2, 0, 1]


def test_an_empty_folder_has_an_index(tmp_path: Path):
    ShardWriter(tmp_path, 4, image_shape=(8, 8, 1)).close()
    assert read_index(tmp_path).image_shape == (8, 8, 1)
    assert list(read_batches(tmp_path, 4)) == []


def test_another_shape_is_refused(tmp_path: Path):
    writer = ShardWriter(tmp_path, 4)
    writer.add(sample(0))
    with pytest.raises(ValueError, match="sample-00001 has shape"):
        writer.add(sample(1, side=7))


@pytest.mark.parametrize("keep", [0, 100, 512, 1024, 3000, 5 * 512])
def test_a_truncated_shard_is_named(tmp_path: Path, keep: int):
    write_samples(tmp_path, 4)
    path = tmp_path / "shard-00000.tar"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ShardError, match="shard-00000.tar"):
        list(read_samples(tmp_path))


def test_every_corrupt_header_is_found(tmp_path: Path):
    write_samples(tmp_path, 4)
    path = tmp_path / "shard-00000.tar"
    whole = path.read_bytes()
    for block in range(0, 12 * 1024, 1024):
        path.write_bytes(whole[:block] + b"\xff" * 20 + whole[block + 20 :])
        with pytest.raises(ShardError, match="shard-00000.tar"):
            list(read_samples(tmp_path))


def test_a_missing_shard_and_a_missing_index_are_named(tmp_path: Path):
    write_samples(tmp_path, 10)
    (tmp_path / "shard-00001.tar").unlink()
    with pytest.raises(ShardError, match=r"shard-00001\.tar is missing; make"):
        list(read_samples(tmp_path))
    with pytest.raises(ShardError, match="not a folder of shards"):
        read_index(tmp_path / "elsewhere")


def test_an_index_cannot_name_files_elsewhere(tmp_path: Path):
    write_samples(tmp_path, 3)
    index = read_with_checksum(tmp_path / "index.json") | {"shards": ["../../etc/passwd"]}
    write_text(tmp_path / "index.json", with_checksum(index))
    with pytest.raises(ShardError, match="names other files"):
        read_index(tmp_path)
