"""Layers of several kernels: one merged kernel computes exactly what all of them do, weighted by the time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from experts.compressed.conditional.kernel_experts import KernelExperts, put_kernel_experts
from experts.compressed.conditional.timestep_recorder import TimestepRecorder
from experts.conditions.condition import Condition
from experts.networks.model_io import save_model
from experts.networks.registry import call_network, load_network
from experts.training.flops import forward_flops
from tests.experts.compressed.pruning.test_layers import NETWORKS, network, predict

LAYERS = {
    "DiTTransformer2DModel": "transformer_blocks.1.ff.net.2",
    "PixArtTransformer2DModel": "transformer_blocks.1.ff.net.0.proj",
    "SD3Transformer2DModel": "transformer_blocks.0.ff_context.net.2",
    "UNet2DModel": "up_blocks.0.resnets.0.conv1",
    "UNet2DConditionModel": "up_blocks.0.resnets.0.conv1",
    "ResidualMLP": "blocks.1.inner",
}


def several(layer, experts, seed=0):
    """Return the layer with `experts` random kernels, its recorder, and the kernels as plain layers."""
    torch.manual_seed(seed)
    recorder = TimestepRecorder()
    module = KernelExperts(recorder, layer, experts, 1000.0)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module, recorder


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["linear", "conv", "strided"]), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.booleans()
)
def test_one_merged_kernel_equals_all_kernels(kind, experts, rows, bias, shared):
    conv = {"stride": 2, "padding": 1} if kind == "strided" else {"padding": "same"}
    layer = nn.Linear(3, 5, bias=bias) if kind == "linear" else nn.Conv2d(3, 5, 3, bias=bias, **conv)
    module, recorder = several(layer.double(), experts)
    module.double()
    x = torch.randn(rows, 4, 3) if kind == "linear" else torch.randn(rows, 3, 6, 7)
    recorder.timestep = torch.full((rows,), 300.0) if shared else torch.rand(rows) * 1000
    expected = 0.0
    for number in range(experts):
        layer.weight.data = module.kernels[number].detach()
        if bias:
            layer.bias.data = module.biases[number].detach()
        gates = module.routing(rows).expand(rows, -1)[:, number]
        expected = expected + gates.reshape(rows, *[1] * (x.ndim - 1)) * layer(x.double())
    with torch.no_grad():
        assert len(module.merged(rows)[0]) == (1 if shared or rows == 1 else rows)
        torch.testing.assert_close(module(x.double()), expected.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("config", NETWORKS, ids=lambda config: config.kind)
def test_a_network_with_kernels_is_saved_and_starts_unchanged(config, tmp_path):
    model = network(config)
    original, path = predict(model), LAYERS[type(model).__name__]
    layer = put_kernel_experts(model, path, 3, 1000.0)
    layer.inherit([], torch.Generator().manual_seed(0))
    torch.testing.assert_close(predict(model), original, rtol=1e-4, atol=1e-4)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    save_model(model, tmp_path / "net")
    loaded = load_network(tmp_path / "net")
    assert not torch.equal(predict(model), original) and torch.equal(predict(loaded), predict(model))


def test_kernels_of_one_time_cost_one_layer():
    model = network(NETWORKS[2])
    noised, condition = torch.zeros(64, 1, 8, 8), Condition.null(64)
    before = forward_flops(lambda: call_network(model, noised, torch.tensor(0.3), condition))
    for path in ("transformer_blocks.1.ff.net.0.proj", "transformer_blocks.1.ff.net.2"):
        put_kernel_experts(model, path, 4, 1000.0)
    assert 1 < forward_flops(lambda: call_network(model, noised, torch.tensor(0.3), condition)) / before <= 1.02


def test_the_own_kernel_leads_inherited_ones():
    module, recorder = several(nn.Linear(3, 5), 3)
    removed = nn.Linear(3, 5)
    module.inherit([removed], torch.Generator().manual_seed(0))
    recorder.timestep = torch.tensor([500.0])
    assert torch.equal(module.kernels[1], removed.weight) and torch.equal(module.biases[1], removed.bias)
    with torch.no_grad():
        assert float(module.routing(1)[0, 1]) < 0.05
    with pytest.raises(ValueError, match="up to 2 layers of shape"):
        module.inherit([nn.Linear(4, 5)], torch.Generator())
    recorder.timestep = torch.tensor([1.0, 2.0])
    with pytest.raises(RuntimeError, match="3 rows and the network's call 2 times"):
        module(torch.zeros(3, 3))
