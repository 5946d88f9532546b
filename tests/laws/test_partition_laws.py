"""Laws of the partition: every sample in exactly one cluster, the same bytes again, memory that does not grow."""

import dataclasses
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_partition.clustering import kmeans
from data_partition.config import DataConfig, PartitionConfig
from data_partition.datasets.build import build_dataset
from data_partition.features.extract import extract_features
from data_partition.partition import make_partition
from data_partition.shards.shards import Sample, ShardWriter, read_samples
from ddm_core.artifacts import Workspace
from tests.data_partition.conftest import files_of

CONFIG = PartitionConfig(num_experts=4, components=16, iterations=6, num_fine=25)


def digits(folder: Path, limit: int = 500) -> Path:
    config = DataConfig(source="digits", image_size=8, limit=limit, shard_samples=128)
    build_dataset(config, folder / "data", Workspace.at(folder / "data_workspace"))
    return folder / "data"


def divide(config: PartitionConfig, dataset: Path, folder: Path) -> Path:
    """The whole way from a data set to its partition."""
    extract_features(config, dataset, folder / "features", Workspace.at(folder / "features_workspace"))
    out = folder / "partition"
    make_partition(config, dataset, folder / "features", out, Workspace.at(folder / "partition_workspace"))
    return out


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("features", ["pixels", "random_conv"])
def test_every_sample_is_in_exactly_one_cluster(tmp_path: Path, balanced: bool, features: str):
    dataset = digits(tmp_path)
    config = dataclasses.replace(CONFIG, balanced=balanced, features=features)
    made = divide(config, dataset, tmp_path)
    for before, after in (("train", "clusters"), ("holdout", "holdout")):
        whole = Counter(sample.key for sample in read_samples(dataset / before))
        parts = [Counter(each.key for each in read_samples(made / after / str(k))) for k in range(4)]
        assert sum(parts, Counter()) == whole
        assert set(whole.values()) == {1}


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_whatever_was_drawn_before(tmp_path: Path):
    dataset = digits(tmp_path)
    first = files_of(divide(CONFIG, dataset, tmp_path / "first"))
    divide(dataclasses.replace(CONFIG, seed=5, num_experts=3), dataset, tmp_path / "between")
    np.random.seed(99)
    assert files_of(divide(CONFIG, digits(tmp_path / "again"), tmp_path / "second")) == first


@pytest.mark.slow
def test_another_seed_gives_another_partition(tmp_path: Path):
    dataset = digits(tmp_path)
    one = divide(CONFIG, dataset, tmp_path / "one")
    other = divide(dataclasses.replace(CONFIG, seed=1), dataset, tmp_path / "other")
    assert (one / "assignment.csv").read_bytes() != (other / "assignment.csv").read_bytes()


def made_up(folder: Path, count: int) -> Path:
    """So many random images, and a few held out."""
    generator = np.random.default_rng(0)
    for name, size in (("train", count), ("holdout", 20)):
        writer = ShardWriter(folder / name, 128)
        for number in range(size):
            image = generator.integers(0, 256, (16, 16, 1), dtype=np.uint8)
            writer.add(Sample(key=f"{name}-{number:06d}", image=image))
        writer.close()
    return folder


def peak_bytes(dataset: Path, folder: Path) -> int:
    tracemalloc.start()
    try:
        divide(CONFIG, dataset, folder)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kmeans, "POINTS_PER_CENTROID", 16)
    small, large = made_up(tmp_path / "small", 600), made_up(tmp_path / "large", 2400)
    divide(CONFIG, small, tmp_path / "warm_up")
    least = peak_bytes(small, tmp_path / "one")
    assert peak_bytes(large, tmp_path / "two") < 1.2 * least
