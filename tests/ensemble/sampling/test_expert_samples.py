"""Latents sampled from the experts: shares of the clusters, classes, cost."""

import numpy as np
import pytest
import torch

from data_partition.partition import Partition
from ddm_core.artifacts import Preempted, Workspace
from ensemble.config import ExpertSamplesConfig
from ensemble.sampling.expert_samples import proportional_counts, sample_classes, sample_counts, sample_expert_latents
from experts.config import ResidualMLPConfig
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert, network_flops
from experts.networks.registry import build_network
from router.expert_samples import ExpertSamples

COUNTS = np.array([300, 100])
BY_CLASS = np.array([[200, 0], [50, 100]])
CONFIG = ExpertSamplesConfig(samples_per_expert=20, steps=3, batch_size=7)


@pytest.fixture
def partition(tmp_path):
    centroids = np.zeros((2, 3), np.float32)
    folder = tmp_path / "partition"
    folder.mkdir()
    Partition(fine_centroids=centroids, fine_to_cluster=np.arange(2), counts=COUNTS, class_counts=BY_CLASS).save(folder)
    return folder


@pytest.fixture
def experts(tmp_path):
    for k in range(2):
        torch.manual_seed(k)
        model = build_network(ResidualMLPConfig(width=8, depth=1), (4,), 2)
        settings = {"prediction": "velocity", "noise_schedule": RECTIFIED_FLOW, "latent_shape": (4,), "num_classes": 2}
        Expert(model=model.eval(), cluster_id=k, **settings).save(tmp_path / f"expert_{k}")
    return {k: tmp_path / f"expert_{k}" for k in range(2)}


def test_expert_samples_have_the_shares_of_the_clusters(experts, partition, tmp_path):
    flops = sample_expert_latents(experts, partition, CONFIG, tmp_path / "out", Workspace.at(tmp_path / "work"))
    samples = ExpertSamples.load(tmp_path / "out")
    assert samples.prior_counts.tolist() == [[200, 0], [50, 100], [300, 100]]
    assert torch.bincount(samples.dataset.cluster_id).tolist() == [30, 10]
    first, second = (samples.dataset.class_id[samples.dataset.cluster_id == k].tolist() for k in range(2))
    assert [first.count(c) for c in (0, 1, -1)] == [20, 5, 5]
    assert second == [1] * 10
    assert 0.8 < samples.dataset.clean.std() < 1.2
    assert flops == 40 * 5 * network_flops(Expert.load(experts[0]).model, (4,))


def test_expert_sample_depends_on_seed_expert_and_row_alone(experts, partition, tmp_path):
    def sample_clean(name, **changes):
        config = ExpertSamplesConfig(**{"samples_per_expert": 20, "steps": 3, "batch_size": 7} | changes)
        sample_expert_latents(experts, partition, config, tmp_path / name, Workspace.at(tmp_path / f"{name}_work"))
        return ExpertSamples.load(tmp_path / name).dataset.clean

    assert torch.allclose(sample_clean("a"), sample_clean("b", batch_size=64), atol=1e-6)
    assert not torch.allclose(sample_clean("c"), sample_clean("d", seed=1))
    assert len(sample_clean("e").unique(dim=0)) == 40


def test_missing_expert_has_no_samples_but_prior_counts(experts, partition, tmp_path):
    sample_expert_latents({1: experts[1]}, partition, CONFIG, tmp_path / "out", Workspace.at(tmp_path / "work"))
    samples = ExpertSamples.load(tmp_path / "out")
    assert samples.dataset.cluster_id.unique().tolist() == [1]
    assert samples.prior_counts[-1].tolist() == [300, 100]


def test_stop_request_preempts_sampling(experts, partition, tmp_path):
    workspace = Workspace.at(tmp_path / "work")
    (tmp_path / "work" / "stop").touch()
    with pytest.raises(Preempted, match="sampling restarts from the first"):
        sample_expert_latents(experts, partition, CONFIG, tmp_path / "out", workspace)


def test_sample_classes_without_labels_are_null(tmp_path):
    centroids = np.zeros((2, 3), np.float32)
    Partition(fine_centroids=centroids, fine_to_cluster=np.arange(2), counts=COUNTS).save(tmp_path)
    counts = proportional_counts(tmp_path)
    assert counts.tolist() == [[300, 100]]
    assert sample_classes(counts[:, 0], 4).tolist() == [-1] * 4


def test_sample_counts_are_at_least_one():
    assert sample_counts(torch.tensor([10_000.0, 1.0]), 10) == [20, 1]
