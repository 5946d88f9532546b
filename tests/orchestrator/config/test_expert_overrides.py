"""Experts that differ: what an entry leaves out is as in `expert`, and every mistake is named."""

import pytest
import torch

from experts.architectures.residual_mlp import ResidualMLP
from experts.config import ResidualMLPConfig, UNetConfig
from experts.networks.model_io import save_model
from experts.networks.pretrained_files import init_checksum
from orchestrator.config.expert_overrides import apply_overrides, ids_in
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import parse_config
from orchestrator.errors import ConfigError


def composed(*overrides):
    return parse_config(compose(["experiment=digits", "partition.num_experts=4", *overrides]))


def test_an_entry_is_laid_over_the_experts_recipe():
    config = composed("experts.3.prediction=noise", "experts.3.noise_schedule=cosine", "experts.0.network.width=256")
    assert sorted(config.experts) == [0, 3]
    assert (config.experts[3].prediction, config.experts[3].noise_schedule) == ("noise", "cosine")
    assert config.experts[3].training == config.expert.training
    assert config.experts[0].network == ResidualMLPConfig(width=256, depth=config.expert.network.depth)
    assert config.experts[0].prediction == config.expert.prediction


def test_many_experts_have_one_entry_and_a_later_one_wins():
    config = composed("experts={0-2: {prediction: noise, noise_schedule: cosine}, 1: {prediction: clean}}")
    assert [config.experts[k].prediction for k in (0, 1, 2)] == ["noise", "clean", "noise"]
    assert config.experts[1].noise_schedule == "cosine"
    assert ids_in("5,0-2") == [5, 0, 1, 2]


def test_another_kind_of_network_begins_with_its_own_defaults():
    config = composed("experts.1.network.kind=unet", "experts.1.network.channels=[8,16]")
    assert config.experts[1].network == UNetConfig(channels=(8, 16))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("experts.1.predicton=noise", ["experts.1.predicton: unknown key; known here:", "prediction"]),
        ("experts.1.network.widht=8", ["experts.1.network.residual_mlp.widht", "width"]),
        ("experts.1.noise_schedule=spiral", ["experts.1.noise_schedule", "linear_beta"]),
        ("experts.4.noise_schedule=cosine", ["experts.4", "expert ids go from 0 to 3"]),
        ("experts.1.training.batch_size=7", ["7 / 4 is not whole"]),
        ("experts.one.noise_schedule=cosine", ["experts.one: not an expert's id; write experts.3"]),
        ("experts.1=5", ["experts.1"]),
        ("experts.1.init=/no/where", ["init=/no/where is no folder with a diffusers model"]),
        ("baselines=[told,tolled]", ["baselines", "'tolled'"]),
        ("distilled_monolith.from_expert=4", ["distilled_monolith.from_expert is 4"]),
    ],
)
def test_a_mistake_says_where_it_is_and_what_is_known(override, words):
    with pytest.raises(ConfigError) as caught:
        composed(override)
    assert all(word in str(caught.value) for word in words), caught.value


def test_told_needs_clusters():
    with pytest.raises(ConfigError, match="needs partition.num_experts > 1"):
        parse_config({"partition": {"num_experts": 1}, "baselines": ["cluster_conditioned"]})


def test_laying_nothing_over_changes_nothing_and_laying_twice_is_laying_once():
    base, over = {"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"c": 5}}
    assert apply_overrides(base, {}) == base
    assert (
        apply_overrides(apply_overrides(base, over), over)
        == apply_overrides(base, over)
        == {"a": 1, "b": {"c": 5, "d": 3}}
    )


def test_a_saved_configuration_is_read_as_it_was_without_its_checkpoint(tmp_path):
    from ddm_core.artifacts import to_jsonable

    torch.manual_seed(0)
    save_model(ResidualMLP(latent_shape=[4], width=8, depth=1), tmp_path / "model")
    config = composed(f"experts.2.init={tmp_path / 'model'}", f"expert.init={tmp_path / 'model'}")
    assert config.experts[2].init_checksum == config.expert.init_checksum == init_checksum(tmp_path / "model")
    (tmp_path / "model").rename(tmp_path / "gone")
    assert parse_config(to_jsonable(config)) == config
