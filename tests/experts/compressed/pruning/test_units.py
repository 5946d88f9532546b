"""Units that are taken out: the network says what it says with them masked, and is really smaller."""

import copy

import pytest
import torch

from ensemble.compression.pruning.masked_sampling import unit_masks
from experts.compressed.pruning.layers import removable_layers, remove_layers
from experts.compressed.pruning.units import parameters_per_unit, prunable_units, prune_units, shrink_to, unit_counts
from experts.compressed.quantization.packed_weight import pack_weight
from experts.compressed.quantization.packing import Packing
from experts.condition import Condition
from experts.config import DiTConfig, ResidualMLPConfig, UNetConfig
from experts.networks.model_io import save_model
from experts.networks.registry import build_network, call_network, load_network
from experts.training.flops import forward_flops

SHAPE = (1, 8, 8)
NETWORKS = (
    ResidualMLPConfig(width=16, depth=2),
    UNetConfig(channels=(8, 16), layers_per_block=1),
    DiTConfig(patch_size=4, heads=3, head_width=8, depth=2),
)
each_network = pytest.mark.parametrize("config", NETWORKS, ids=lambda config: config.kind)


def network(config):
    torch.manual_seed(0)
    model = build_network(config, SHAPE, 3).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def said(model, rows=5):
    generator = torch.Generator().manual_seed(1)
    noised, t = torch.randn(rows, *SHAPE, generator=generator), torch.rand(rows, generator=generator)
    with torch.no_grad():
        return call_network(model, noised, t, Condition(torch.arange(rows) % 3))


def some(counts):
    """About half the units of every layer, not the first ones, and only one of the last layer."""
    kept = {path: list(range(1, count, 2)) for path, count in counts.items()}
    return kept | {list(counts)[-1]: [0]}


def masks(counts, kept):
    return {path: torch.zeros(count).index_fill(0, torch.tensor(kept[path]), 1.0) for path, count in counts.items()}


@each_network
def test_a_cut_network_says_what_the_masked_one_says(config):
    model = network(config)
    counts = prunable_units(model)
    kept, smaller = some(counts), copy.deepcopy(model)
    prune_units(smaller, kept)
    with unit_masks(model, masks(counts, kept)):
        expected = said(model)
    torch.testing.assert_close(said(smaller), expected, atol=1e-5, rtol=1e-5)
    assert (said(model) - expected).abs().amax() > 1e-3
    assert prunable_units(smaller) == {path: len(units) for path, units in kept.items()}


@each_network
def test_as_many_parameters_go_as_was_said_and_flops_with_them(config):
    model = network(config)
    counts, sizes, smaller = prunable_units(model), parameters_per_unit(model), copy.deepcopy(model)
    kept = some(counts)
    prune_units(smaller, kept)
    gone = sum(sizes[path] * (counts[path] - len(kept[path])) for path in counts)
    whole, left = (sum(parameter.numel() for parameter in each.parameters()) for each in (model, smaller))
    assert whole - left == gone > 0
    assert forward_flops(lambda: said(smaller, 1)) < forward_flops(lambda: said(model, 1))


@each_network
def test_widths_are_read_off_and_make_a_fresh_network_that_loads_the_parameters(config, tmp_path):
    model = network(config)
    assert unit_counts(model) == {}
    kept = some(prunable_units(model))
    prune_units(model, kept)
    assert unit_counts(model) == {path: len(units) for path, units in kept.items()}
    fresh = type(model).from_config(model.config)
    shrink_to(fresh, unit_counts(model))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(said(fresh.eval()), said(model))
    save_model(model, tmp_path / "a")
    loaded = load_network(tmp_path / "a")
    assert torch.equal(said(loaded), said(model)) and unit_counts(loaded) == unit_counts(model)


def test_heads_of_a_transformer_are_cut_with_the_shapes_of_their_layers():
    model = network(NETWORKS[2])
    prune_units(model, {"transformer_blocks.0.attn1": [0, 2], "transformer_blocks.1.ff": [5]})
    attention, feed = model.transformer_blocks[0].attn1, model.transformer_blocks[1].ff
    assert attention.heads == 2 and attention.inner_dim == 16
    assert attention.to_v.weight.shape == (16, 24) and attention.to_out[0].weight.shape == (24, 16)
    assert feed.net[0].proj.weight.shape == (1, 24) and feed.net[2].weight.shape == (24, 1)
    assert unit_counts(model) == {"transformer_blocks.0.attn1": 2, "transformer_blocks.1.ff": 1}


def test_channels_of_a_residual_block_go_in_whole_groups_with_their_time_embedding():
    model = network(UNetConfig(channels=(8, 24), layers_per_block=1))
    path = "mid_block.resnets.0"
    assert prunable_units(model)[path] == 8
    prune_units(model, {path: [1, 2, 7]})
    resnet = model.get_submodule(path)
    assert (resnet.norm2.num_groups, resnet.norm2.num_channels) == (3, 9)
    assert resnet.conv1.weight.shape[0] == resnet.conv2.weight.shape[1] == resnet.time_emb_proj.weight.shape[0] == 9


def test_a_smaller_network_can_be_cut_again_trained_and_quantized(tmp_path):
    model = network(NETWORKS[2])
    path = "transformer_blocks.0.ff"
    prune_units(model, {path: range(10, 40)})
    prune_units(model, {path: range(8, 16)})
    said(model)
    call_network(model, torch.randn(2, *SHAPE), torch.rand(2), Condition.null(2)).square().mean().backward()
    assert model.get_submodule(path).net[2].weight.grad.shape == (24, 8)
    name = f"{path}.net.2.weight"
    pack_weight(model, name, Packing(bits=4, group_size=8, shape=tuple(model.get_parameter(name).shape)))
    assert path not in prunable_units(model) and unit_counts(model) == {path: 8}
    save_model(model, tmp_path / "a")
    assert torch.equal(said(load_network(tmp_path / "a")), said(model))
    with pytest.raises(ValueError, match="before it is quantized"):
        prune_units(model, {path: [0]})


@pytest.mark.parametrize("config", NETWORKS[1:], ids=lambda config: config.kind)
def test_layers_can_be_gone_beside_narrow_ones(config, tmp_path):
    model = network(config)
    remove_layers(model, removable_layers(model)[:1])
    prune_units(model, some(prunable_units(model)))
    save_model(model, tmp_path / "a")
    assert torch.equal(said(load_network(tmp_path / "a")), said(model))


@pytest.mark.parametrize("indices", [[], [0, 0], [-1], [3]])
def test_units_that_cannot_stay_are_refused(indices):
    model = network(NETWORKS[2])
    with pytest.raises(ValueError, match="has 3 units and cannot keep"):
        prune_units(model, {"transformer_blocks.0.attn1": indices})


def test_layers_without_units_are_refused():
    with pytest.raises(ValueError, match="blocks.9 has no units"):
        shrink_to(network(NETWORKS[0]), {"blocks.9": 1})
