"""Per-expert overrides: missing keys come from `expert`, and every mistake is named."""

import pytest
import torch
from diffusers import AutoencoderTiny

from experts.architectures.residual_mlp import ResidualMLP
from experts.config import ResidualMLPConfig, UNetConfig
from experts.errors import CodecError
from experts.networks.autoencoder_files import path_checksum
from experts.networks.model_io import save_model
from experts.networks.pretrained_files import init_checksum
from orchestrator.config.expert_overrides import apply_overrides, parse_expert_ids
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import parse_config
from orchestrator.errors import ConfigError


def composed(*overrides):
    return parse_config(compose(["experiment=digits", "partition.num_experts=4", *overrides]))


def test_expert_override_is_merged_into_expert():
    config = composed("experts.3.prediction=noise", "experts.3.noise_schedule=cosine", "experts.0.network.width=256")
    assert sorted(config.experts) == [0, 3]
    assert (config.experts[3].prediction, config.experts[3].noise_schedule) == ("noise", "cosine")
    assert config.experts[3].training == config.expert.training
    assert config.experts[0].network == ResidualMLPConfig(width=256, depth=config.expert.network.depth)
    assert config.experts[0].prediction == config.expert.prediction


def test_override_of_several_ids_later_key_wins():
    config = composed("experts={0-2: {prediction: noise, noise_schedule: cosine}, 1: {prediction: clean}}")
    assert [config.experts[k].prediction for k in (0, 1, 2)] == ["noise", "clean", "noise"]
    assert config.experts[1].noise_schedule == "cosine"
    assert parse_expert_ids("5,0-2") == [5, 0, 1, 2]


def test_override_of_network_kind_uses_its_defaults():
    config = composed("experts.1.network.kind=unet", "experts.1.network.channels=[8,16]")
    assert config.experts[1].network == UNetConfig(channels=(8, 16))


@pytest.mark.parametrize(
    ("override", "messages"),
    [
        ("experts.1.predicton=noise", ["experts.1.predicton: unknown key; known here:", "prediction"]),
        ("experts.1.network.widht=8", ["experts.1.network.residual_mlp.widht", "width"]),
        ("experts.1.noise_schedule=spiral", ["experts.1.noise_schedule", "linear_beta"]),
        ("experts.4.noise_schedule=cosine", ["experts.4", r"expert ids must be in 0 ... 3"]),
        ("experts.1.training.batch_size=7", ["must be divisible by partition.num_experts", "got 7 / 4"]),
        ("experts.one.noise_schedule=cosine", ["keys of experts must be expert ids; got experts.one; write experts.3"]),
        ("experts.1=5", ["experts.1"]),
        ("experts.1.init=/no/where", ["init=/no/where must be a folder with a diffusers model"]),
        ("baselines=[cluster_conditioned,tolled]", ["baselines", "'tolled'"]),
        ("baselines=monolith", ["a list is expected; write baselines=", "monolith"]),
        ("distilled_monolith.from_expert=4", ["expert ids must be in 0 ... 3; got distilled_monolith.from_expert=4"]),
    ],
)
def test_invalid_override_names_place_and_known_values(override, messages):
    with pytest.raises(ConfigError) as caught:
        composed(override)
    assert all(message in str(caught.value) for message in messages), caught.value


def test_cluster_conditioned_needs_several_clusters():
    with pytest.raises(ConfigError, match="needs partition.num_experts > 1"):
        parse_config({"partition": {"num_experts": 1}, "baselines": ["cluster_conditioned"]})


def test_apply_overrides_is_idempotent():
    base, overrides = {"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"c": 5}}
    assert apply_overrides(base, {}) == base
    assert (
        apply_overrides(apply_overrides(base, overrides), overrides)
        == apply_overrides(base, overrides)
        == {"a": 1, "b": {"c": 5, "d": 3}}
    )


def test_parse_config_saved_needs_no_checkpoint(tmp_path):
    from ddm_core.artifacts import to_jsonable

    torch.manual_seed(0)
    save_model(ResidualMLP(latent_shape=[4], width=8, depth=1), tmp_path / "model")
    config = composed(f"experts.2.init={tmp_path / 'model'}", f"expert.init={tmp_path / 'model'}")
    assert config.experts[2].init_checksum == config.expert.init_checksum == init_checksum(tmp_path / "model")
    (tmp_path / "model").rename(tmp_path / "moved")
    assert parse_config(to_jsonable(config)) == config


def test_contents_of_an_autoencoder_are_recorded(tmp_path, monkeypatch):
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(tmp_path / "vae")
    monkeypatch.chdir(tmp_path)
    codec = composed("codec=autoencoder", "codec.path=vae").codec
    assert (codec.path, codec.path_checksum) == (str(tmp_path / "vae"), path_checksum(str(tmp_path / "vae")))
    with pytest.raises(CodecError, match="must be a folder with a diffusers autoencoder"):
        composed("codec=autoencoder", "codec.path=./nowhere")
