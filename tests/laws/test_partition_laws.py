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
from tests.data_partition.conftest import read_files

CONFIG = PartitionConfig(num_experts=4, components=16, iterations=6, num_fine=25)


def digits(folder: Path, limit: int = 500) -> Path:
    config = DataConfig(source="digits", image_size=8, limit=limit, shard_samples=128)
    build_dataset(config, folder / "data", Workspace.at(folder / "data_workspace"))
    return folder / "data"


def partition_dataset(config: PartitionConfig, dataset: Path, folder: Path) -> Path:
    """Extract features and make the partition."""
    extract_features(config, dataset, folder / "features", Workspace.at(folder / "features_workspace"))
    out = folder / "partition"
    make_partition(config, dataset, folder / "features", out, Workspace.at(folder / "partition_workspace"))
    return out


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("features", ["pixels", "random_conv"])
def test_every_sample_is_in_exactly_one_cluster(tmp_path: Path, balanced: bool, features: str):
    dataset = digits(tmp_path)
    config = dataclasses.replace(CONFIG, balanced=balanced, features=features)
    partition = partition_dataset(config, dataset, tmp_path)
    for before, after in (("train", "clusters"), ("holdout", "holdout")):
        all_keys = Counter(sample.key for sample in read_samples(dataset / before))
        cluster_keys = [Counter(sample.key for sample in read_samples(partition / after / str(k))) for k in range(4)]
        assert sum(cluster_keys, Counter()) == all_keys
        assert set(all_keys.values()) == {1}


@pytest.mark.slow
def test_partition_of_same_seed_is_byte_identical(tmp_path: Path):
    dataset = digits(tmp_path)
    first = read_files(partition_dataset(CONFIG, dataset, tmp_path / "first"))
    partition_dataset(dataclasses.replace(CONFIG, seed=5, num_experts=3), dataset, tmp_path / "between")
    np.random.seed(99)
    assert read_files(partition_dataset(CONFIG, digits(tmp_path / "again"), tmp_path / "second")) == first


@pytest.mark.slow
def test_partition_depends_on_seed(tmp_path: Path):
    dataset = digits(tmp_path)
    first = partition_dataset(CONFIG, dataset, tmp_path / "first")
    second = partition_dataset(dataclasses.replace(CONFIG, seed=1), dataset, tmp_path / "second")
    assert (first / "assignment.csv").read_bytes() != (second / "assignment.csv").read_bytes()


def write_random_images(folder: Path, count: int) -> Path:
    """Write `count` random training images and 20 held-out ones."""
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
        partition_dataset(CONFIG, dataset, folder)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.integration
def test_partition_memory_is_independent_of_data_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kmeans, "POINTS_PER_CENTROID", 16)
    small, large = write_random_images(tmp_path / "small", 600), write_random_images(tmp_path / "large", 2400)
    partition_dataset(CONFIG, small, tmp_path / "warm_up")
    small_peak = peak_bytes(small, tmp_path / "first")
    assert peak_bytes(large, tmp_path / "second") < 1.2 * small_peak
