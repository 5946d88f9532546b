"""A router that trains on latents of the experts instead of the data."""

import pytest
import torch

from ddm_core.artifacts import CorruptArtifact, read_json
from experts.codecs.registry import load_codec
from experts.config import TrainingConfig
from experts.training.latent_dataset import LatentDataset
from experts.training.latents.training_set import encode_latents
from router.config import RouterConfig
from router.expert_samples import ExpertSamples
from router.router import Router
from router.train import train_router

CONFIG = RouterConfig(width=16, depth=1, training=TrainingConfig(steps=60, batch_size=64, warmup_steps=5))
COUNTS = torch.tensor([[7.0, 1.0], [2.0, 3.0], [9.0, 4.0]], dtype=torch.float64)


@pytest.fixture
def expert_samples(clusters, codec, tmp_path, workspace):
    """Write samples of perfect experts: the data themselves."""
    dataset = encode_latents(clusters, load_codec(codec), codec, workspace)
    ExpertSamples(dataset=dataset, prior_counts=COUNTS).save(tmp_path / "expert_samples")
    return tmp_path / "expert_samples"


def test_router_trained_on_expert_samples_separates_clusters(expert_samples, codec, holdouts, tmp_path, workspace):
    summary = train_router(CONFIG, [], codec, holdouts, tmp_path / "router", workspace, expert_samples=expert_samples)
    router = Router.load(tmp_path / "router")
    assert torch.equal(router.prior_counts, COUNTS)
    assert summary.images == 120
    assert summary.quality.bins[0].accuracy > 0.95
    assert read_json(tmp_path / "router" / "quality.json")["bins"][0]["accuracy"] == summary.quality.bins[0].accuracy


def test_counts_of_other_partition_raise(tmp_path):
    ids = torch.tensor([0, 2])
    ExpertSamples(
        dataset=LatentDataset(clean=torch.zeros(2, 3), class_id=ids, cluster_id=ids), prior_counts=COUNTS
    ).save(tmp_path)
    with pytest.raises(CorruptArtifact, match="generate them again"):
        ExpertSamples.load(tmp_path)
