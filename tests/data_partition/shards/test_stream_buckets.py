"""Images of several sizes that stay in tars of the user: what is read equals a copy, ordered by tar and size."""

import io
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from data_partition.assignment import write_clusters
from data_partition.config import DataConfig
from data_partition.datasets.build import build_dataset
from data_partition.shards.join import join_shards
from data_partition.shards.shards import (
    decode_sample,
    open_offsets,
    read_encoded,
    read_identities,
    read_index,
    read_samples,
)
from ddm_core.artifacts import Workspace
from tests.data_partition.shards.test_tar import make_tar

SIZES = ((16, 16), (24, 16), (16, 24))
"""Width and height of the images in turn."""


def write_mixed_tars(folder: Path, counts: Sequence[int] = (30, 30)) -> str:
    """Write tars whose pictures have three sizes in turn, with classes; return the pattern of their names."""
    folder.mkdir()
    for tar, count in enumerate(counts):
        files = {}
        for number in range(tar * 1000, tar * 1000 + count):
            width, height = SIZES[number % 3]
            pixels, buffer = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8), io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            files[f"{number:05d}.png"], files[f"{number:05d}.cls"] = buffer.getvalue(), str(number % 2).encode()
        (folder / f"{tar}.tar").write_bytes(make_tar(files).getvalue())
    return f"{{0..{len(counts) - 1}}}.tar"


def bucket_config(path: str) -> DataConfig:
    return DataConfig(
        source="webdataset",
        mode="stream",
        path=path,
        image_size=16,
        channels=3,
        fit="crop",
        aspect_buckets=("24x16", "16x24"),
        holdout=0.2,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both data sets of the same tars."""
    root = tmp_path_factory.mktemp("buckets")
    stream = bucket_config(f"{root}/tars/{write_mixed_tars(root / 'tars')}")
    for config in (stream, replace(stream, mode="copy")):
        build_dataset(config, root / config.mode, Workspace.at(root / f"work_{config.mode}"))
    return root


@pytest.mark.parametrize("part", ["train", "holdout"])
def test_stream_has_the_samples_of_a_copy(built, part):
    stream, copy = ({one.key: one for one in read_encoded(built / mode / part)} for mode in ("stream", "copy"))
    assert stream == copy
    stream, copy = (sorted(read_identities(built / mode / part)) for mode in ("stream", "copy"))
    assert stream == copy
    squares = list(read_samples(built / "stream" / part))
    expected = {one.key: one.image for one in read_samples(built / "copy" / part)}
    assert all(np.array_equal(one.image, expected[one.key]) for one in squares)


def test_every_row_has_the_size_that_its_index_says(built):
    index = read_index(built / "stream" / "train")
    assert len(index.shards) == 6 and set(index.shard_buckets) == {0, 1, 2}
    shapes = [decode_sample(one, "").image.shape for one in read_encoded(built / "stream" / "train")]
    assert shapes == list(index.row_shapes)
    keys = [one.key for one in read_encoded(built / "stream" / "train", 9)]
    assert keys == [one.key for one in read_encoded(built / "stream" / "train")][9:]


def test_clusters_and_what_is_joined_of_them_keep_sizes(built, tmp_path):
    folder = built / "stream" / "train"
    before = {one.key: one for one in read_encoded(folder)}
    write_clusters(folder, 2, tmp_path, lambda row: row // 2 % 2, lambda *_: None)
    clusters = [tmp_path / str(k) for k in range(2)]
    joined = join_shards([*clusters, clusters[0]], tmp_path / "joined")
    assert joined.buckets == read_index(folder).buckets
    for place in (*clusters, tmp_path / "joined"):
        found, index = list(read_encoded(place)), read_index(place)
        assert [decode_sample(one, "").image.shape for one in found] == list(index.row_shapes)
        assert all(before[one.key] == one for one in found)
    assert joined.count == read_index(folder).count + read_index(clusters[0]).count
    offsets, _ = open_offsets(clusters[0])
    tars = [tar for tar, _ in groupby(offsets.tars)]
    assert len(tars) == 2, "the rows of a tar are together"


def test_images_of_a_batch_that_are_not_stored_need_one_size():
    with pytest.raises(ValidationError, match="store_latents=false .* one size alone; set data.store_latents=true"):
        replace(bucket_config("a.tar"), store_latents=False)
