import numpy as np
import pytest
import torch

from data_partition.shards.shards import Sample, ShardWriter
from ddm_core.artifacts import Workspace
from experts.training.latent_dataset import LatentDataset


@pytest.fixture
def workspace(tmp_path):
    return Workspace.at(tmp_path / "work")


@pytest.fixture
def shards(tmp_path):
    """40 images, 4 x 4 grey, of 3 classes; brighter with the class."""
    draws = np.random.default_rng(0)
    writer = ShardWriter(tmp_path / "shards", 16, class_names=("dark", "middle", "bright"))
    for number in range(40):
        image = draws.integers(0, 100, (4, 4, 1)) + 70 * (number % 3)
        writer.add(Sample(key=f"{number:04d}", image=image.astype(np.uint8), label=number % 3))
    writer.close()
    return tmp_path / "shards"


@pytest.fixture
def make_dataset():
    def make(count=50, shape=(2,), classes=3):
        generator = torch.Generator().manual_seed(0)
        return LatentDataset(
            clean=torch.randn(count, *shape, generator=generator),
            class_id=torch.arange(count) % classes,
            cluster_id=torch.zeros(count, dtype=torch.int64),
        )

    return make
