"""Layers taken out whole: what is left computes as if they were not there, and comes back from a folder."""

import pytest
import torch

from experts.compressed.pruning.layers import layers_disabled, removable_layers, remove_layers, removed_layers
from experts.condition import Condition
from experts.config import DiTConfig, ResidualMLPConfig, UNetConfig
from experts.networks.model_io import STRUCTURE, load_model, save_model
from experts.networks.registry import build_network, call_network

SHAPE = (1, 8, 8)
NETWORKS = (
    ResidualMLPConfig(width=16, depth=3),
    UNetConfig(channels=(8, 16), layers_per_block=2),
    DiTConfig(patch_size=4, heads=2, head_width=8, depth=3),
)


def network(config):
    torch.manual_seed(0)
    model = build_network(config, SHAPE, 3).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def said(model):
    generator = torch.Generator().manual_seed(1)
    noised, t = torch.randn(4, *SHAPE, generator=generator), torch.rand(4, generator=generator)
    with torch.no_grad():
        return call_network(model, noised, t, Condition.null(4))


@pytest.mark.parametrize("config", NETWORKS, ids=lambda config: config.kind)
def test_every_layer_can_go_and_a_folder_remembers(config, tmp_path):
    model = network(config)
    whole, units = said(model), removable_layers(model)
    assert units and not removed_layers(model)
    for number, unit in enumerate(units):
        with layers_disabled(model, [unit]):
            assert removed_layers(model) == [unit]
            gone = said(model)
        assert not torch.equal(gone, whole)
        assert torch.equal(said(model), whole)
        if number < 3:
            small = network(config)
            remove_layers(small, [unit])
            assert torch.equal(said(small), gone)
            save_model(small, tmp_path / str(number))
            again = load_model((type(small),), tmp_path / str(number))
            assert torch.equal(said(again), gone) and removed_layers(again) == [unit]
    remove_layers(model, units)
    save_model(model, tmp_path / "all")
    again = load_model((type(model),), tmp_path / "all")
    assert torch.equal(said(again), said(model)) and sorted(removed_layers(again)) == sorted(units)
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in network(config).parameters())


def test_a_removed_layer_of_the_residual_network_contributes_nothing():
    model = network(NETWORKS[0])
    with layers_disabled(model, ["blocks.1"]):
        gone = said(model)
    torch.nn.init.zeros_(model.get_submodule("blocks.1.outer").weight)
    torch.nn.init.zeros_(model.get_submodule("blocks.1.outer").bias)
    torch.testing.assert_close(said(model), gone, rtol=0, atol=1e-6)


def test_a_removed_layer_of_the_transformer_contributes_nothing():
    model = network(NETWORKS[2])
    with layers_disabled(model, ["transformer_blocks.1.ff"]):
        gone = said(model)
    torch.nn.init.zeros_(model.get_submodule("transformer_blocks.1.ff.net.2").weight)
    torch.nn.init.zeros_(model.get_submodule("transformer_blocks.1.ff.net.2").bias)
    torch.testing.assert_close(said(model), gone, rtol=0, atol=1e-6)


def test_what_cannot_go_is_refused_and_whole_networks_have_no_such_file(tmp_path):
    model = network(NETWORKS[1])
    assert "down_blocks.1.resnets.0" not in removable_layers(model)
    with pytest.raises(ValueError, match="no layer that can be taken out"):
        remove_layers(model, ["down_blocks.1.resnets.0"])
    save_model(model, tmp_path)
    assert not (tmp_path / STRUCTURE).exists()
