import dataclasses
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_partition.assignment import write_clusters
from data_partition.config import DataConfig
from data_partition.datasets.build import ENLARGED, NO_CAPTION, build_dataset
from data_partition.datasets.source import is_held_out
from data_partition.errors import (
    InvalidCaptions,
    MissingLabels,
    MixedLabels,
    MixedSizes,
    NoSamples,
    OneClass,
    TooManyUnreadable,
)
from data_partition.shards.images import decode_image
from data_partition.shards.shards import decode_sample, read_batches, read_encoded, read_index, read_samples
from ddm_core.artifacts import Preempted, Workspace
from tests.data_partition.conftest import read_files
from tests.data_partition.datasets.test_image_folder import write
from tests.data_partition.shards.test_color import P3, encode
from tests.data_partition.shards.test_tar import make_tar


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
    assert "skipped a/bad.png" in caplog.text
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


def test_what_is_left_out_or_converted_is_said(tmp_path: Path, workspace: Workspace):
    config = write_tree(tmp_path / "in")
    (tmp_path / "in" / "new folder").mkdir()
    (tmp_path / "in" / "a" / "phone.HEIC").write_bytes(b"")
    (tmp_path / "in" / "a" / "notes").write_bytes(b"")
    (tmp_path / "in" / "a" / "0.txt").write_text("a caption")
    (tmp_path / "in" / "b" / "deep.png").write_bytes(encode(np.full((4, 4), 4096, np.uint16), "PNG"))
    summary = build_dataset(config, tmp_path / "out", workspace)
    assert summary.class_names == ("a", "b") and summary.count + summary.holdout_count == 41
    assert workspace.notices == [
        "1 skipped: a caption, which data.captions=true reads (a/0.txt)",
        "1 skipped: not an image: it has no suffix (a/notes)",
        "1 skipped: .heic is not read; convert it to PNG or JPEG (a/phone.HEIC)",
        "1 skipped: a folder without images, which is no class (new folder)",
        "1 read: more than 8 bits a channel, scaled to 8 (b/deep.png)",
    ]
    written = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert len(written["skipped"]) == 4 == sum(written["skipped_counts"].values())
    assert sum(written["remarks"].values()) == 1


def test_empty_result_says_what_was_there(tmp_path: Path, workspace: Workspace):
    for number in range(3):
        (tmp_path / f"{number}.heic").write_bytes(b"")
    with pytest.raises(NoSamples, match=r"3 skipped: \.heic is not read; convert it.*first: 0.heic"):
        build_dataset(DataConfig(source="image_folder", path=str(tmp_path)), tmp_path / "out", workspace)


def test_advised_holdout_is_enough(tmp_path: Path, workspace: Workspace):
    config = dataclasses.replace(write_tree(tmp_path / "in"), holdout=1e-9)
    with pytest.raises(NoSamples) as caught:
        build_dataset(config, tmp_path / "out", workspace)
    advised = float(re.findall(r" to (0\.\d+), or add images", str(caught.value))[0])
    summary = build_dataset(dataclasses.replace(config, holdout=advised), tmp_path / "again", workspace)
    assert summary.holdout_count == 1


def test_one_class_raises(tmp_path: Path, workspace: Workspace):
    config = write_tree(tmp_path / "in")
    with pytest.raises(OneClass, match="all 5 training images.*data.labels=false.*data.limit"):
        build_dataset(dataclasses.replace(config, limit=5), tmp_path / "out", workspace)
    build_dataset(dataclasses.replace(config, limit=5, labels=False), tmp_path / "again", workspace)


def write_shard(path: Path, labels: list[bytes]) -> DataConfig:
    image = encode(np.zeros((4, 4), np.uint8), "PNG")
    files = {
        f"{row:03d}.{kind}": data for row, label in enumerate(labels) for kind, data in (("png", image), ("cls", label))
    }
    path.write_bytes(make_tar(files).getvalue())
    return DataConfig(source="webdataset", path=str(path), image_size=4, holdout=0.3)


def test_words_are_class_names(tmp_path: Path, workspace: Workspace):
    config = write_shard(tmp_path / "a.tar", [b"tiger cat", b" tabby\n"] * 20)
    summary = build_dataset(config, tmp_path / "out", workspace)
    assert summary.class_names == ("tiger cat", "tabby") == read_index(tmp_path / "out" / "train").class_names
    for sample in read_samples(tmp_path / "out" / "train"):
        assert sample.label == int(sample.key.split("/")[1]) % 2


def test_words_among_numbers_raise(tmp_path: Path, workspace: Workspace):
    config = write_shard(tmp_path / "a.tar", [b"0", b"1", b"tabby"])
    with pytest.raises(MixedLabels, match="class of a.tar: 000 is a number, but that of a.tar: 002 is 'tabby'"):
        build_dataset(config, tmp_path / "out", workspace)
    build_dataset(dataclasses.replace(config, labels=False, holdout=0.5), tmp_path / "again", workspace)


def test_captions_are_stored_and_missing_ones_counted(tmp_path: Path, workspace: Workspace):
    config = dataclasses.replace(write_tree(tmp_path / "in"), captions=True)
    with pytest.raises(InvalidCaptions, match="none of 40 images has a caption"):
        build_dataset(config, tmp_path / "none", workspace)
    for number in range(0, 40, 2):
        (tmp_path / "in" / "a" / f"{number}.txt").write_text(f" picture\t{number} \n", encoding="utf-8")
    summary = build_dataset(config, tmp_path / "out", workspace)
    assert summary.remarks == {NO_CAPTION: 20} and summary.skipped == ()
    for batch in read_batches(tmp_path / "out" / "train", 7):
        for key, caption in zip(batch.keys, batch.captions, strict=True):
            number = int(key.split("/")[1].split("%")[0])
            assert caption == ("" if number % 2 else f"picture {number}")


@pytest.mark.parametrize(
    ("kind", "options", "kept"),
    [
        ("JPEG", {}, True),
        ("WEBP", {}, True),
        ("AVIF", {}, True),
        ("PNG", {"compress_level": 0}, True),
        ("JPEG", {"comment": b"made by"}, False),
        ("JPEG", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"}, False),
        ("PNG", {"icc_profile": P3}, False),
        ("GIF", {}, False),
        ("BMP", {}, False),
    ],
)
def test_file_of_an_image_that_need_not_change_is_kept(
    tmp_path: Path, workspace: Workspace, kind: str, options: dict[str, Any], kept: bool
):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    (tmp_path / "in").mkdir()
    for number, image in enumerate(pixels):
        (tmp_path / "in" / f"{number}.{kind.lower()}").write_bytes(encode(image, kind, **options))
    config = DataConfig(
        source="image_folder", path=str(tmp_path / "in"), labels=False, image_size=8, channels=3, holdout=0.3
    )
    for size, is_same in ((8, kept), (4, False)):
        build_dataset(dataclasses.replace(config, image_size=size, fit="crop"), tmp_path / f"out{size}", workspace)
        shards = tmp_path / f"out{size}" / "train"
        for stored, sample in zip(read_encoded(shards), read_samples(shards), strict=True):
            path = tmp_path / "in" / unquote(stored.key)
            assert (path.read_bytes() in stored.files.values()) == is_same
            if size == 8:
                np.testing.assert_array_equal(sample.image, decode_image(path.read_bytes()))


def test_buckets_have_shards_of_their_own_that_clusters_keep(tmp_path: Path, workspace: Workspace):
    (tmp_path / "in").mkdir()
    for number in range(60):
        size = ((8, 8), (16, 8), (8, 16))[number % 3]
        Image.new("L", size, number).save(tmp_path / "in" / f"{number:02d}.png")
    config = DataConfig(
        source="image_folder",
        path=str(tmp_path / "in"),
        image_size=8,
        labels=False,
        fit="crop",
        aspect_buckets=("8x4", "4x8"),
        shard_samples=8,
        holdout=0.2,
    )
    build_dataset(config, tmp_path / "out", workspace)
    index = read_index(tmp_path / "out" / "train")
    assert index.image_shapes == ((8, 8, 1), (4, 8, 1), (8, 4, 1))
    assert set(index.shard_buckets) == {0, 1, 2}
    clusters = write_clusters(
        tmp_path / "out" / "train", 2, tmp_path / "clusters", lambda row: row % 2, lambda row, sample: None
    )
    assert sum(cluster.count for cluster in clusters) == index.count
    for folder in (tmp_path / "out" / "train", tmp_path / "clusters" / "1"):
        encoded = list(read_encoded(folder))
        assert [decode_sample(each, "").image.shape for each in encoded] == list(read_index(folder).row_shapes)
        assert {sample.image.shape for sample in read_samples(folder)} == {(8, 8, 1)}, "all others read squares"
    assert any("8x4" in notice and "4x8" in notice for notice in workspace.notices)


def test_enlarged_images_are_counted(tmp_path: Path, workspace: Workspace):
    config = dataclasses.replace(write_tree(tmp_path / "in"), image_size=64, fit="crop")
    summary = build_dataset(config, tmp_path / "out", workspace)
    assert summary.remarks[ENLARGED] == summary.count + summary.holdout_count
