import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_partition.config import DataConfig
from data_partition.datasets.build import build_dataset, is_held_out
from data_partition.errors import MissingLabels, MixedSizes, NoSamples, TooManyUnreadable
from data_partition.shards.shards import read_index, read_samples
from ddm_core.artifacts import Preempted, Workspace
from tests.data_partition.conftest import read_files
from tests.data_partition.datasets.test_image_folder import write


def write_tree(root: Path, count: int = 40) -> DataConfig:
    for number in range(count):
        write(root / "ab"[number % 2] / f"{number}.png", number)
    return DataConfig(source="image_folder", path=str(root), image_size=4, holdout=0.3, shard_samples=8)


def keys_in(folder: Path) -> set[str]:
    return {sample.key for sample in read_samples(folder)}


def test_every_image_is_in_train_or_holdout(tmp_path: Path, workspace: Workspace):
    summary = build_dataset(write_tree(tmp_path / "in"), tmp_path / "out", workspace)
    train, holdout = keys_in(tmp_path / "out" / "train"), keys_in(tmp_path / "out" / "holdout")
    assert len(train | holdout) == 40 == summary.count + summary.holdout_count
    assert not train & holdout
    assert sum(summary.class_counts.values()) == summary.count
    assert summary.class_names == ("a", "b") == read_index(tmp_path / "out" / "holdout").class_names
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["count"] == summary.count


@given(st.text())
def test_larger_holdout_share_contains_the_smaller(key: str):
    assert not is_held_out(key, 0.2) or is_held_out(key, 0.5)


def test_holdout_share_is_respected():
    held_out = sum(is_held_out(f"key {number}", 0.1) for number in range(10_000))
    assert 900 < held_out < 1100


def test_build_dataset_is_deterministic(tmp_path: Path, workspace: Workspace):
    config = write_tree(tmp_path / "in")
    build_dataset(config, tmp_path / "first", workspace)
    build_dataset(config, tmp_path / "second", workspace)
    assert read_files(tmp_path / "first") == read_files(tmp_path / "second")


def test_limit_applies_to_training_samples(tmp_path: Path, workspace: Workspace):
    config = DataConfig(source="digits", image_size=8, limit=33)
    assert build_dataset(config, tmp_path, workspace).count == 33


def test_build_dataset_without_labels(tmp_path: Path, workspace: Workspace):
    config = dataclasses.replace(write_tree(tmp_path / "in"), labels=False)
    summary = build_dataset(config, tmp_path / "out", workspace)
    assert (summary.class_names, summary.class_counts) == ((), {})
    assert {sample.label for sample in read_samples(tmp_path / "out" / "train")} == {-1}


def test_image_without_class_folder_raises(tmp_path: Path, workspace: Workspace):
    config = write_tree(tmp_path / "in")
    write(tmp_path / "in" / "0.png")
    with pytest.raises(MissingLabels, match="set data.labels=false"):
        build_dataset(config, tmp_path / "out", workspace)


def test_unreadable_images_are_logged_up_to_a_limit(
    tmp_path: Path, workspace: Workspace, caplog: pytest.LogCaptureFixture
):
    config = write_tree(tmp_path / "in")
    (tmp_path / "in" / "a" / "bad.png").write_bytes(b"not an image")
    summary = build_dataset(dataclasses.replace(config, max_unreadable=0.1), tmp_path / "out", workspace)
    assert [image.key for image in summary.skipped] == ["a/bad%2Epng"]
    assert "skipped a/bad%2Epng" in caplog.text
    assert "bad" in json.loads((tmp_path / "out" / "dataset.json").read_text())["skipped"][0]["key"]
    with pytest.raises(TooManyUnreadable, match="1 of 41 images cannot be read.*bad"):
        build_dataset(config, tmp_path / "again", workspace)


def test_empty_train_or_holdout_raises(tmp_path: Path, workspace: Workspace):
    (tmp_path / "empty").mkdir()
    config = DataConfig(source="image_folder", path=str(tmp_path / "empty"))
    with pytest.raises(NoSamples, match="gave no training image"):
        build_dataset(config, tmp_path / "out", workspace)
    with pytest.raises(NoSamples, match="raise data.holdout"):
        build_dataset(dataclasses.replace(write_tree(tmp_path / "in"), holdout=1e-9), tmp_path / "again", workspace)


def test_mixed_sizes_raise(tmp_path: Path, workspace: Workspace):
    with pytest.raises(MixedSizes, match="digits-.* is 8x8.*must be 28x28"):
        build_dataset(DataConfig(source="digits"), tmp_path, workspace)


def test_build_dataset_stops_on_request(tmp_path: Path, workspace: Workspace):
    (workspace.scratch / "stop").touch()
    with pytest.raises(Preempted):
        build_dataset(DataConfig(source="digits", image_size=8), tmp_path, workspace)


def test_build_dataset_preserves_pixels(tmp_path: Path, workspace: Workspace):
    build_dataset(write_tree(tmp_path / "in"), tmp_path / "out", workspace)
    for sample in read_samples(tmp_path / "out" / "train"):
        number = int(sample.key.split("/")[1].split("%")[0])
        np.testing.assert_array_equal(sample.image, np.full((4, 4, 1), number))
