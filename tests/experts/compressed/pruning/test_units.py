"""Unit pruning: a pruned network equals the masked one, and has fewer parameters and FLOPs."""

import copy

import pytest
import torch

from ensemble.compression.pruning.masked_sampling import unit_masks
from experts.compressed.pruning.layers import removable_layers, remove_layers
from experts.compressed.pruning.units import parameters_per_unit, prunable_units, prune_units, shrink_to, unit_counts
from experts.compressed.quantization.packed_weight import pack_weight
from experts.compressed.quantization.packing import Packing
from experts.conditions.condition import Condition
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


def predict(model, rows=5):
    generator = torch.Generator().manual_seed(1)
    noised, t = torch.randn(rows, *SHAPE, generator=generator), torch.rand(rows, generator=generator)
    with torch.no_grad():
        return call_network(model, noised, t, Condition(torch.arange(rows) % 3))


def half_of(counts):
    """Return about half the units of every layer, without the first, and only one of the last layer."""
    remaining = {path: list(range(1, count, 2)) for path, count in counts.items()}
    return remaining | {list(counts)[-1]: [0]}


def masks(counts, remaining):
    return {
        path: torch.zeros(count).index_fill(0, torch.tensor(remaining[path]), 1.0) for path, count in counts.items()
    }


@each_network
def test_pruned_network_equals_masked_network(config):
    model = network(config)
    counts = prunable_units(model)
    remaining, smaller = half_of(counts), copy.deepcopy(model)
    prune_units(smaller, remaining)
    with unit_masks(model, masks(counts, remaining)):
        expected = predict(model)
    torch.testing.assert_close(predict(smaller), expected, atol=1e-5, rtol=1e-5)
    assert (predict(model) - expected).abs().amax() > 1e-3
    assert prunable_units(smaller) == {path: len(units) for path, units in remaining.items()}


@each_network
def test_parameters_per_unit_match_the_pruned_count(config):
    model = network(config)
    counts, sizes, smaller = prunable_units(model), parameters_per_unit(model), copy.deepcopy(model)
    remaining = half_of(counts)
    prune_units(smaller, remaining)
    removed = sum(sizes[path] * (counts[path] - len(remaining[path])) for path in counts)
    before, after = (sum(parameter.numel() for parameter in candidate.parameters()) for candidate in (model, smaller))
    assert before - after == removed > 0
    assert forward_flops(lambda: predict(smaller, 1)) < forward_flops(lambda: predict(model, 1))


@each_network
def test_unit_counts_rebuild_the_pruned_network(config, tmp_path):
    model = network(config)
    assert unit_counts(model) == {}
    remaining = half_of(prunable_units(model))
    prune_units(model, remaining)
    assert unit_counts(model) == {path: len(units) for path, units in remaining.items()}
    fresh = type(model).from_config(model.config)
    shrink_to(fresh, unit_counts(model))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(predict(fresh.eval()), predict(model))
    save_model(model, tmp_path / "a")
    loaded = load_network(tmp_path / "a")
    assert torch.equal(predict(loaded), predict(model)) and unit_counts(loaded) == unit_counts(model)


def test_pruned_heads_shrink_their_projections():
    model = network(NETWORKS[2])
    prune_units(model, {"transformer_blocks.0.attn1": [0, 2], "transformer_blocks.1.ff": [5]})
    attention, feed = model.transformer_blocks[0].attn1, model.transformer_blocks[1].ff
    assert attention.heads == 2 and attention.inner_dim == 16
    assert attention.to_v.weight.shape == (16, 24) and attention.to_out[0].weight.shape == (24, 16)
    assert feed.net[0].proj.weight.shape == (1, 24) and feed.net[2].weight.shape == (24, 1)
    assert unit_counts(model) == {"transformer_blocks.0.attn1": 2, "transformer_blocks.1.ff": 1}


def test_resnet_channels_are_pruned_in_norm_groups():
    model = network(UNetConfig(channels=(32, 96), layers_per_block=1))
    path = "mid_block.resnets.0"
    assert prunable_units(model)[path] == 8
    prune_units(model, {path: [1, 2, 7]})
    resnet = model.get_submodule(path)
    assert (resnet.norm2.num_groups, resnet.norm2.num_channels) == (3, 36)
    assert resnet.conv1.weight.shape[0] == resnet.conv2.weight.shape[1] == resnet.time_emb_proj.weight.shape[0] == 36


def test_pruned_network_can_be_pruned_trained_and_quantized(tmp_path):
    model = network(NETWORKS[2])
    path = "transformer_blocks.0.ff"
    prune_units(model, {path: range(10, 40)})
    prune_units(model, {path: range(8, 16)})
    predict(model)
    call_network(model, torch.randn(2, *SHAPE), torch.rand(2), Condition.null(2)).square().mean().backward()
    assert model.get_submodule(path).net[2].weight.grad.shape == (24, 8)
    name = f"{path}.net.2.weight"
    pack_weight(model, name, Packing(bits=4, group_size=8, shape=tuple(model.get_parameter(name).shape)))
    assert path not in prunable_units(model) and unit_counts(model) == {path: 8}
    save_model(model, tmp_path / "a")
    assert torch.equal(predict(load_network(tmp_path / "a")), predict(model))
    with pytest.raises(ValueError, match="before it is quantized"):
        prune_units(model, {path: [0]})


@pytest.mark.parametrize("config", NETWORKS[1:], ids=lambda config: config.kind)
def test_layers_and_units_can_both_be_removed(config, tmp_path):
    model = network(config)
    remove_layers(model, removable_layers(model)[:1])
    prune_units(model, half_of(prunable_units(model)))
    save_model(model, tmp_path / "a")
    assert torch.equal(predict(load_network(tmp_path / "a")), predict(model))


@pytest.mark.parametrize("indices", [[], [0, 0], [-1], [3]])
def test_invalid_unit_indices_are_refused(indices):
    model = network(NETWORKS[2])
    with pytest.raises(ValueError, match="has 3 units and cannot keep"):
        prune_units(model, {"transformer_blocks.0.attn1": indices})


def test_layers_without_units_are_refused():
    with pytest.raises(ValueError, match="blocks.9 has no units"):
        shrink_to(network(NETWORKS[0]), {"blocks.9": 1})
