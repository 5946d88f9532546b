"""Layer removal: the other layers compute as if the layer were absent, and folders restore the removal."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.testbed.backbones import build
from experts.compressed.pruning.layers import (
    advise_pruning,
    layer_sizes,
    layers_disabled,
    removable_layers,
    remove_layers,
    removed_layers,
)
from experts.conditions.condition import Condition
from experts.conditions.text_embedding import TextEmbedding
from experts.config import DiffusersConfig, DiTConfig, ResidualMLPConfig, UNetConfig
from experts.networks.model_io import STRUCTURE, save_model
from experts.networks.registry import build_network, call_network, load_network
from experts.training.flops import count_parameters

SHAPE = (1, 8, 8)
NETWORKS = (
    ResidualMLPConfig(width=16, depth=3),
    UNetConfig(channels=(8, 16), layers_per_block=2),
    DiTConfig(patch_size=4, heads=2, head_width=8, depth=3),
    DiffusersConfig(
        class_name="PixArtTransformer2DModel",
        settings={"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "cross_attention_dim": 16},
    ),
    DiffusersConfig(
        class_name="UNet2DConditionModel",
        settings={
            "block_out_channels": [8, 16],
            "layers_per_block": 1,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
            "attention_head_dim": 2,
            "norm_num_groups": 4,
        },
    ),
    DiffusersConfig(
        class_name="SD3Transformer2DModel",
        settings={"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "caption_projection_dim": 16},
    ),
)


def network(config):
    torch.manual_seed(0)
    text = TextEmbedding.zeros(4, 6, 6) if config.kind == "diffusers" else None
    model = build_network(config, SHAPE, 3 if text is None else 0, text).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def predict(model):
    generator = torch.Generator().manual_seed(1)
    noised, t = torch.randn(4, *SHAPE, generator=generator), torch.rand(4, generator=generator)
    with torch.no_grad():
        return call_network(model, noised, t, Condition.null(4))


@pytest.mark.parametrize("config", NETWORKS, ids=lambda config: config.kind)
def test_every_layer_can_be_removed_saved_and_loaded(config, tmp_path):
    model = network(config)
    original, units = predict(model), removable_layers(model)
    assert units and not removed_layers(model)
    for number, unit in enumerate(units):
        with layers_disabled(model, [unit]):
            assert removed_layers(model) == [unit]
            without_layer = predict(model)
        assert not torch.equal(without_layer, original)
        assert torch.equal(predict(model), original)
        if number < 3:
            small = network(config)
            remove_layers(small, [unit])
            assert torch.equal(predict(small), without_layer)
            save_model(small, tmp_path / str(number))
            loaded = load_network(tmp_path / str(number))
            assert torch.equal(predict(loaded), without_layer) and removed_layers(loaded) == [unit]
    remove_layers(model, units)
    save_model(model, tmp_path / "all")
    loaded = load_network(tmp_path / "all")
    assert torch.equal(predict(loaded), predict(model)) and sorted(removed_layers(loaded)) == sorted(units)
    assert sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in network(config).parameters())


def test_removed_mlp_block_contributes_nothing():
    model = network(NETWORKS[0])
    with layers_disabled(model, ["blocks.1"]):
        without_layer = predict(model)
    torch.nn.init.zeros_(model.get_submodule("blocks.1.outer").weight)
    torch.nn.init.zeros_(model.get_submodule("blocks.1.outer").bias)
    torch.testing.assert_close(predict(model), without_layer, rtol=0, atol=1e-6)


def test_removed_transformer_layer_contributes_nothing():
    model = network(NETWORKS[2])
    with layers_disabled(model, ["transformer_blocks.1.ff"]):
        without_layer = predict(model)
    torch.nn.init.zeros_(model.get_submodule("transformer_blocks.1.ff.net.2").weight)
    torch.nn.init.zeros_(model.get_submodule("transformer_blocks.1.ff.net.2").bias)
    torch.testing.assert_close(predict(model), without_layer, rtol=0, atol=1e-6)


def test_laptop_is_advised_where_it_removes_layers():
    assert advise_pruning(network(NETWORKS[0])) == "set prune=laptop"
    assert "quantize it instead (prune=laptop is for UNet2DModel" in advise_pruning(build("AuraFlowTransformer2DModel"))


def test_unremovable_layer_is_refused(tmp_path):
    model = network(NETWORKS[1])
    assert "down_blocks.1.resnets.0" not in removable_layers(model)
    with pytest.raises(ValueError, match="not a removable layer"):
        remove_layers(model, ["down_blocks.1.resnets.0"])
    save_model(model, tmp_path)
    assert not (tmp_path / STRUCTURE).exists()


@pytest.mark.parametrize("config", NETWORKS, ids=lambda config: config.kind)
@settings(deadline=None, max_examples=25)
@given(draws=st.data())
def test_size_of_a_set_is_what_its_removal_frees(config, draws):
    model = network(config)
    for _ in range(2):  # the second time from a pruned network
        layers, sizes, before = removable_layers(model), layer_sizes(model), count_parameters(model)
        chosen = draws.draw(st.lists(st.sampled_from(layers), unique=True)) if layers else []
        remove_layers(model, chosen)
        assert before - count_parameters(model) == sum(size for paths, size in sizes.items() if paths <= set(chosen))
