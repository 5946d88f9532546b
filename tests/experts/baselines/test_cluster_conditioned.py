"""The cluster-conditioned baseline."""

import pytest
import torch

from ddm_core.artifacts import CorruptArtifact, read_json, write_json
from experts.architectures.residual_mlp import ResidualMLP
from experts.baselines.cluster_conditioned import (
    ClusterConditionedExpert,
    is_cluster_conditioned,
    train_cluster_conditioned,
    with_cluster,
)
from experts.codecs.registry import fit_codec
from experts.conditions.condition import Condition
from experts.config import CodecConfig, ExpertConfig, ResidualMLPConfig, TrainingConfig
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from experts.networks.pretrained import build_initial_model

NOISED, T = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.2, 0.5, 0.9])


def network(num_classes):
    torch.manual_seed(0)
    model = ResidualMLP(latent_shape=[4], num_classes=num_classes, width=16, depth=1).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    metadata = {"prediction": "velocity", "noise_schedule": RECTIFIED_FLOW, "latent_shape": (4,), "cluster_id": 0}
    return Expert(model=model, num_classes=num_classes, **metadata)


def test_every_class_cluster_pair_has_a_unique_index():
    classes, clusters = torch.tensor([0, 0, 1, 1, -1, -1]), torch.tensor([0, 1, 0, 1, 0, 1])
    assert with_cluster(Condition(classes), clusters, 2, 2).class_id.tolist() == [0, 1, 2, 3, 4, 5]
    assert with_cluster(Condition.null(2), torch.tensor([0, 1]), 0, 2).class_id.tolist() == [0, 1]


def test_without_classes_the_cluster_is_the_class():
    shared = network(3)
    for k in range(3):
        expert = ClusterConditionedExpert(shared=shared, cluster_id=k, num_clusters=3)
        expected = shared.velocity(NOISED, T, Condition(torch.full((3,), k)))
        assert expert.num_classes == 0
        assert torch.equal(expert.velocity(NOISED, T, Condition.null(3)), expected)


def test_one_cluster_equals_class_conditional_network():
    shared = network(4)
    expert = ClusterConditionedExpert(shared=shared, cluster_id=0, num_clusters=1)
    condition = Condition(torch.tensor([0, 2, -1]))
    expected = shared.velocity(NOISED, T, Condition(torch.tensor([0, 2, 3])))
    assert expert.num_classes == 3
    assert torch.equal(expert.velocity(NOISED, T, condition), expected)


def test_shared_network_is_saved_once_for_all_clusters(tmp_path):
    ClusterConditionedExpert(shared=network(6), cluster_id=1, num_clusters=2).save(tmp_path)
    experts = ClusterConditionedExpert.load_all(tmp_path)
    assert is_cluster_conditioned(tmp_path) and sorted(experts) == [0, 1]
    assert experts[0].shared is experts[1].shared
    assert not torch.equal(*(member.velocity(NOISED, T, Condition.null(3)) for member in experts.values()))


@pytest.mark.parametrize("settings", [{"num_clusters": 4}, {"num_clusters": "2"}, {}, []])
def test_invalid_num_clusters_is_refused(settings, tmp_path):
    ClusterConditionedExpert(shared=network(6), cluster_id=0, num_clusters=2).save(tmp_path)
    write_json(tmp_path / "cluster_conditioned.json", settings)
    with pytest.raises(CorruptArtifact, match="train it again"):
        ClusterConditionedExpert.load_all(tmp_path)


def test_only_class_cluster_pairs_are_trained(shards, tmp_path, workspace):
    """Check that the embedding's null row is never trained: the cluster is always part of the condition."""
    fit_codec(CodecConfig(components=4), shards, tmp_path / "codec", workspace)
    training = TrainingConfig(steps=20, batch_size=20, warmup_steps=2)
    config = ExpertConfig(network=ResidualMLPConfig(width=16, depth=1), training=training)
    summary = train_cluster_conditioned(
        config, [shards, shards], tmp_path / "codec", tmp_path / "cluster_conditioned", workspace
    )
    assert summary.images == 80
    assert read_json(tmp_path / "cluster_conditioned" / "cluster_conditioned.json") == {"num_clusters": 2}
    experts = ClusterConditionedExpert.load_all(tmp_path / "cluster_conditioned")
    assert experts[0].num_classes == 3
    embedding = experts[0].shared.model.class_embedding.weight
    initial = build_initial_model(config, (4,), 8).model.class_embedding.weight
    change = (embedding - initial).abs().sum(1)
    assert (change[:8] > 0).all() and change[8] == 0
