"""A router that learns from latents instead of the data."""

import pytest
import torch

from ddm_core.artifacts import CorruptArtifact, read_json
from experts.codecs.registry import load_codec
from experts.config import TrainingConfig
from experts.training.latent_dataset import LatentDataset, encode_latents
from router.config import RouterConfig
from router.expert_samples import ExpertSamples
from router.router import Router
from router.train import train_router

CONFIG = RouterConfig(width=16, depth=1, training=TrainingConfig(steps=60, batch_size=64, warmup_steps=5))
COUNTS = torch.tensor([[7.0, 1.0], [2.0, 3.0], [9.0, 4.0]], dtype=torch.float64)


@pytest.fixture
def draws(clusters, codec, tmp_path, workspace):
    """Perfect experts: what they draw are the samples."""
    dataset = encode_latents(clusters, load_codec(codec), codec, workspace)
    ExpertSamples(dataset=dataset, prior_counts=COUNTS).save(tmp_path / "draws")
    return tmp_path / "draws"


def test_it_never_sees_a_cluster_and_knows_them_apart(draws, codec, holdouts, tmp_path, workspace):
    summary = train_router(CONFIG, [], codec, holdouts, tmp_path / "router", workspace, draws=draws)
    router = Router.load(tmp_path / "router")
    assert torch.equal(router.prior_counts, COUNTS)
    assert summary.images == 120
    assert summary.quality.bins[0].accuracy > 0.95
    assert read_json(tmp_path / "router" / "quality.json")["bins"][0]["accuracy"] == summary.quality.bins[0].accuracy


def test_counts_of_another_partition_are_refused(tmp_path):
    ids = torch.tensor([0, 2])
    ExpertSamples(
        dataset=LatentDataset(clean=torch.zeros(2, 3), class_id=ids, cluster_id=ids), prior_counts=COUNTS
    ).save(tmp_path)
    with pytest.raises(CorruptArtifact, match="draw them again"):
        ExpertSamples.load(tmp_path)
