"""SVDQuant layers: output, size, and folders."""

import copy
import json

import pytest
import torch
from torch import nn

from ddm_core.artifacts import CorruptArtifact
from experts.compressed.quantization.fake_quant import fake_quantize_groups
from experts.compressed.quantization.packing import Packing
from experts.compressed.quantization.svd_linear import SVDLinear, SVDShape, rounded_branch
from experts.conditions.condition import Condition
from experts.config import DiTConfig, ResidualMLPConfig
from experts.networks.model_io import QUANTIZATION_CONFIG, save_model
from experts.networks.registry import build_network, call_network, load_network

SHAPE = (1, 8, 8)


def layer(inside=48, out=20, rank=3, bits=4, activation_bits=4, is_unsigned=False, bias=True, branch_bits=16):
    generator = torch.Generator().manual_seed(0)
    packing = Packing(bits=bits, group_size=16, shape=(out, inside))
    shape = SVDShape(
        packing=packing,
        rank=rank,
        branch_bits=branch_bits,
        activation_bits=activation_bits,
        is_unsigned=is_unsigned,
        has_bias=bias,
    )
    svd_layer = SVDLinear(shape)
    svd_layer.set_residual(torch.randn(out, inside, generator=generator))
    for buffer in (svd_layer.smooth, svd_layer.shift, *([svd_layer.bias] if bias else [])):
        buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    svd_layer.set_low_rank(torch.randn(rank, inside, generator=generator), torch.randn(out, rank, generator=generator))
    return svd_layer


@pytest.mark.parametrize(
    "changes", [{}, {"rank": 0}, {"branch_bits": 8}, {"bits": 8}, {"is_unsigned": True}, {"bias": False}]
)
def test_output_is_branch_plus_rounded_residual(changes):
    svd_layer, x = layer(**changes), torch.rand(2, 7, 48)
    smoothed = (x + svd_layer.shift) / svd_layer.smooth.float()
    down, up = svd_layer.low_rank_weights()
    weight = up @ down
    rounded = fake_quantize_groups(smoothed, 4, 16, bool(changes.get("is_unsigned")))
    expected = smoothed @ weight.T + rounded @ svd_layer.residual().T
    expected = expected if svd_layer.bias is None else expected + svd_layer.bias
    torch.testing.assert_close(svd_layer(x), expected, rtol=1e-4, atol=1e-4)


def test_layer_is_linear_without_activation_rounding():
    svd_layer = layer(activation_bits=None)
    down, up = svd_layer.low_rank_weights()
    weight = (up @ down + svd_layer.residual()) / svd_layer.smooth.float()
    x = torch.randn(5, 48)
    torch.testing.assert_close(svd_layer(x), (x + svd_layer.shift) @ weight.T + svd_layer.bias, rtol=1e-4, atol=1e-4)


def test_four_bits_plus_branch_take_a_third_of_16_bits():
    svd_layer = SVDLinear(
        SVDShape(
            packing=Packing(bits=4, group_size=64, shape=(1536, 384)),
            rank=16,
            branch_bits=16,
            activation_bits=4,
            is_unsigned=False,
            has_bias=True,
        )
    )
    assert sum(buffer.nbytes for buffer in svd_layer.buffers()) <= 0.35 * 2 * 1536 * 384


@pytest.mark.parametrize("branch_bits", [8, 16])
def test_branch_weights_equal_their_rounding(branch_bits):
    svd_layer, generator = layer(branch_bits=branch_bits), torch.Generator().manual_seed(2)
    weights = torch.randn(3, 48, generator=generator), torch.randn(20, 3, generator=generator)
    svd_layer.set_low_rank(*weights)
    rounded_weights = rounded_branch(*weights, svd_layer.shape)
    for stored, rounded, exact in zip(svd_layer.low_rank_weights(), rounded_weights, weights, strict=True):
        assert torch.equal(stored, rounded)
        torch.testing.assert_close(stored, exact, atol=0.03, rtol=0)


def network():
    torch.manual_seed(0)
    model = build_network(DiTConfig(patch_size=4, heads=2, head_width=16, depth=1), SHAPE, 3).eval()
    for path, linear in [item for item in model.named_modules() if type(item[1]) is nn.Linear]:
        model.set_submodule(path, layer(linear.in_features, linear.out_features))
    return model


def predict(model):
    generator = torch.Generator().manual_seed(1)
    noised, t = torch.randn(5, *SHAPE, generator=generator), torch.rand(5, generator=generator)
    with torch.no_grad():
        return call_network(model, noised, t, Condition.null(5))


def test_svd_network_saves_and_copies_bit_for_bit(tmp_path):
    model = network()
    save_model(model, tmp_path / "a")
    save_model(load_network(tmp_path / "a"), tmp_path / "b")
    assert torch.equal(predict(load_network(tmp_path / "b")), predict(model))
    assert torch.equal(predict(copy.deepcopy(model)), predict(model))


@pytest.mark.parametrize(
    "change", [{"rank": 99}, {"branch_bits": 4}, {"activation_bits": 5}, {"has_bias": False}, {"packing": {}}]
)
def test_damaged_folder_is_refused(change, tmp_path):
    save_model(network(), tmp_path)
    config = json.loads((tmp_path / QUANTIZATION_CONFIG).read_text())
    path = next(iter(config))
    (tmp_path / QUANTIZATION_CONFIG).write_text(json.dumps(config | {path: config[path] | change}))
    with pytest.raises(CorruptArtifact, match="complete"):
        load_network(tmp_path)


def test_svd_layer_of_wrong_shape_is_refused(tmp_path):
    torch.manual_seed(0)
    save_model(build_network(ResidualMLPConfig(width=32, depth=1), SHAPE, 3), tmp_path)
    (tmp_path / QUANTIZATION_CONFIG).write_text(json.dumps({"entry": {"kind": "svd_linear"} | layer().settings()}))
    with pytest.raises(CorruptArtifact, match="no linear layer of shape"):
        load_network(tmp_path)
