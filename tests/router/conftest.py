import numpy as np
import pytest

from data_partition.shards.shards import Sample, ShardWriter
from ddm_core.artifacts import Workspace
from experts.codecs.registry import fit_codec
from experts.config import CodecConfig

CLASSES = ("dark", "bright")


@pytest.fixture
def workspace(tmp_path):
    return Workspace.at(tmp_path / "work")


def write_cluster(folder, count, brightness, first_seed):
    """Write gray 4 x 4 images around one brightness; a third of them have the class of the other cluster."""
    generator = np.random.default_rng(first_seed)
    writer = ShardWriter(folder, 64, class_names=CLASSES)
    for number in range(count):
        image = np.clip(generator.normal(brightness, 12, (4, 4, 1)), 0, 255).astype(np.uint8)
        label = int(brightness > 128) ^ (number % 3 == 0)
        writer.add(Sample(key=f"{folder.name}-{number:04d}", image=image, label=label))
    writer.close()
    return folder


@pytest.fixture
def clusters(tmp_path):
    """Write three quarters dark and one quarter bright images."""
    return [write_cluster(tmp_path / "dark", 90, 60, 0), write_cluster(tmp_path / "bright", 30, 200, 1)]


@pytest.fixture
def holdouts(tmp_path):
    return [write_cluster(tmp_path / "held_dark", 30, 60, 2), write_cluster(tmp_path / "held_bright", 10, 200, 3)]


@pytest.fixture
def codec(tmp_path, clusters, workspace):
    fit_codec(CodecConfig(kind="pixels"), clusters[0], tmp_path / "codec", workspace)
    return tmp_path / "codec"
