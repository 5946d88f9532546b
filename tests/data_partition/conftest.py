"""A small data set of real digits, built once, and synthetic samples."""

from pathlib import Path

import numpy as np
import pytest

from data_partition.config import DataConfig
from data_partition.datasets.build import build_dataset
from data_partition.shards.shards import Sample, ShardWriter
from ddm_core.artifacts import Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.at(tmp_path / "workspace")


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    config = DataConfig(source="digits", image_size=8, limit=600, shard_samples=256)
    build_dataset(config, folder / "data", Workspace.at(folder / "workspace"))
    return folder / "data"


def make_sample(number: int, side: int = 6, channels: int = 1) -> Sample:
    """Make a sample whose pixels, class and caption depend on its number alone."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, channels), dtype=np.uint8)
    return Sample(key=f"sample-{number:05d}", image=pixels, label=number % 3, caption=f"number {number}")


def write_samples(folder: Path, count: int, samples_per_shard: int = 4) -> list[Sample]:
    samples = [make_sample(number) for number in range(count)]
    writer = ShardWriter(folder, samples_per_shard, ("a", "b", "c"))
    for written in samples:
        writer.add(written)
    writer.close()
    return samples


def read_files(folder: Path) -> dict[str, bytes]:
    """Read every file below a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
