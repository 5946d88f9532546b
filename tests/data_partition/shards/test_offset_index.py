"""A data set that stays in tars of the user: what is read from it equals a copy, and no change goes unnoticed."""

import io
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from data_partition.assignment import write_clusters
from data_partition.config import DataConfig, PartitionConfig
from data_partition.datasets.build import build_dataset
from data_partition.errors import ShardChanged, ShardError
from data_partition.features.extract import extract_features
from data_partition.partition import make_partition
from data_partition.shards import offset_index
from data_partition.shards.shards import (
    open_offsets,
    read_encoded,
    read_identities,
    read_index,
    read_labels,
    read_samples,
    read_without_images,
)
from ddm_core.artifacts import Workspace, list_files
from ddm_core.files.checksums import checksum
from tests.data_partition.shards.test_tar import make_tar

SIDE = 16


def encode_image(number: int, side: int, kind: str) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def write_tars(folder: Path, counts: Sequence[int] = (40, 40, 40)) -> str:
    """Write tars of PNGs and JPEGs, some of another size, with classes as words and captions; return their URL."""
    folder.mkdir()
    for tar, count in enumerate(counts):
        files = {}
        for number in range(tar * 1000, tar * 1000 + count):
            kind = ("PNG", "JPEG")[number % 2]
            files[f"{number:05d}.{'png' if kind == 'PNG' else 'jpg'}"] = encode_image(
                number, SIDE + 4 * (number % 3), kind
            )
            files[f"{number:05d}.cls"] = ("cat", "dog")[number // 2 % 2].encode()
            files[f"{number:05d}.txt"] = f"picture {number}\nnumber {number}".encode()
        (folder / f"{tar}.tar").write_bytes(make_tar(files).getvalue())
    return f"{folder}/{{0..{len(counts) - 1}}}.tar"


def stream_config(path: str, **settings: object) -> DataConfig:
    return DataConfig(
        source="webdataset",
        mode="stream",
        path=path,
        image_size=SIDE,
        channels=3,
        fit="crop",
        captions=True,
        holdout=0.2,
        **settings,
    )


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): checksum(path) for path in list_files(folder)}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both data sets of the same tars, and the partitions of both."""
    root = tmp_path_factory.mktemp("built")
    stream = stream_config(write_tars(root / "tars"))
    for config in (stream, replace(stream, mode="copy")):
        folder, workspace = root / config.mode, Workspace.at(root / f"work_{config.mode}")
        build_dataset(config, folder / "dataset", workspace)
        partition = PartitionConfig(num_experts=2, components=8, num_fine=4)
        extract_features(partition, folder / "dataset", folder / "features", workspace)
        make_partition(partition, folder / "dataset", folder / "features", folder / "partition", workspace)
    return root


FOLDERS = ("dataset/train", "dataset/holdout", "partition/clusters/0", "partition/clusters/1", "partition/holdout/1")


@pytest.mark.parametrize("folder", FOLDERS)
def test_stream_gives_the_samples_of_a_copy(built, folder):
    stream, copy = built / "stream" / folder, built / "copy" / folder
    assert list(read_encoded(stream)) == list(read_encoded(copy))
    assert list(read_encoded(stream, 7)) == list(read_encoded(copy))[7:]
    assert list(read_identities(stream)) == list(read_identities(copy))
    assert list(read_labels(stream)) == list(read_labels(copy))
    bare = read_without_images(stream, 2, 9)
    assert list(zip(bare.keys, bare.captions, bare.more_captions, bare.labels.tolist(), strict=True)) == [
        (sample.key, sample.caption, sample.more_captions, sample.label) for sample in list(read_samples(copy))[2:9]
    ]
    assert not list(stream.glob("*.tar"))


def test_stream_gives_the_partition_of_a_copy(built):
    stream, copy = contents(built / "stream"), contents(built / "copy")
    shared = [name for name in stream if "dataset" not in name and "/clusters/" not in name and "/holdout/" not in name]
    assert [name for name in shared if stream[name] != copy.get(name)] == []
    assert {"features/features.npy", "partition/assignment.csv", "partition/balance.json"} <= set(shared)


def test_index_does_not_depend_on_the_engine(built, tmp_path):
    _, config = open_offsets(built / "stream" / "dataset" / "train")
    build_dataset(replace(config, engine="ray"), tmp_path / "dataset", Workspace.at(tmp_path / "work"))
    assert contents(tmp_path / "dataset") == contents(built / "stream" / "dataset")


def test_one_range_is_read_for_images_that_lie_together(built, monkeypatch):
    index, _ = open_offsets(built / "stream" / "dataset" / "train")
    rows = index.rows_of(0)
    assert list(index.windows(rows)) == [rows]
    monkeypatch.setattr(offset_index, "MAX_GAP", 1)
    assert list(index.windows(rows)) == [range(row, row + 1) for row in rows]


@pytest.fixture
def tars(tmp_path: Path) -> tuple[Path, Path]:
    """The folder of an offset index, and the first of its tars."""
    config = stream_config(write_tars(tmp_path / "tars", (10, 10)))
    build_dataset(config, tmp_path / "dataset", Workspace.at(tmp_path / "work"))
    return tmp_path / "dataset" / "train", tmp_path / "tars" / "0.tar"


def test_truncated_tar_is_an_error_with_both_sizes(tars):
    folder, tar = tars
    size = tar.stat().st_size
    tar.write_bytes(tar.read_bytes()[: size // 2])
    with pytest.raises(ShardChanged, match=rf"0\.tar has {size // 2} bytes, and had {size} when it was indexed"):
        list(read_encoded(folder))


def test_changed_image_is_an_error_with_its_key(tars):
    folder, tar = tars
    index, _ = open_offsets(folder)
    content = bytearray(tar.read_bytes())
    content[int(index.rows["offset"][3]) + 5] ^= 1
    tar.write_bytes(content)
    with pytest.raises(ShardChanged, match=f"sample '{index.text(3)[0]}' of .*0.tar is not as it was indexed"):
        list(read_encoded(folder))


def test_missing_tar_is_an_error(tars):
    folder, tar = tars
    tar.unlink()
    with pytest.raises(Exception, match=r"0\.tar does not exist"):
        list(read_encoded(folder))


@pytest.mark.parametrize("name", ["offsets.bin", "texts.bin"])
def test_damaged_index_is_an_error(tars, name):
    folder, _ = tars
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ShardError, match="corrupt, by its checksum"):
        list(read_encoded(folder))
    (folder / name).write_bytes(content[:-1])
    with pytest.raises(ShardError, match="not the rows|not an offset index"):
        list(read_encoded(folder))


def test_compressed_tar_is_refused(tmp_path):
    files = {f"{number}.png": encode_image(number, SIDE, "PNG") for number in range(4)}
    (tmp_path / "a.tar.gz").write_bytes(make_tar(files, "w:gz").getvalue())
    config = replace(stream_config(f"{tmp_path}/a.tar.gz"), labels=False, captions=False)
    with pytest.raises(ShardError, match="cannot be read in ranges: it is compressed"):
        build_dataset(config, tmp_path / "dataset", Workspace.at(tmp_path / "work"))


def test_stream_needs_tars():
    for settings, message in (
        ({"source": "digits"}, "data.source=webdataset"),
        ({"mode": "copy", "store_latents": False}, "data.mode=stream"),
    ):
        values = {"source": "webdataset", "mode": "stream", "path": "a.tar", "fit": "crop"} | settings
        with pytest.raises(ValidationError, match=message):
            DataConfig(**values)


def test_clusters_of_many_experts_are_written_in_turns(built, tmp_path, monkeypatch):
    monkeypatch.setattr("data_partition.assignment.OPEN_TARS", 4)
    source, rows = built / "stream" / "dataset" / "train", []
    indices = write_clusters(source, 5, tmp_path, lambda row: row % 5, lambda row, sample: rows.append(sample.key))
    assert rows == [sample.key for sample in read_encoded(source)]
    assert sum(index.count for index in indices) == read_index(source).count
    assert [sample.key for sample in read_encoded(tmp_path / "4")] == rows[4::5]


def test_long_names_in_a_tar_are_found(tmp_path):
    files = {f"{'long' * 40}-{number}.png": encode_image(number, SIDE, "PNG") for number in range(20)}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())
    config = replace(stream_config(f"{tmp_path}/a.tar"), labels=False, captions=False)
    build_dataset(config, tmp_path / "dataset", Workspace.at(tmp_path / "work"))
    assert sum(read_index(tmp_path / "dataset" / part).count for part in ("train", "holdout")) == 20
    assert list(read_encoded(tmp_path / "dataset" / "train"))
