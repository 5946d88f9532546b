"""A layer of few bits with a low-rank branch: what it computes, and folders that hold it."""

import copy
import json

import pytest
import torch
from torch import nn

from ddm_core.artifacts import CorruptArtifact
from experts.compressed.quantization.fake_quant import fake_quantize_groups
from experts.compressed.quantization.packing import Packing
from experts.compressed.quantization.svd_linear import SVDLinear, SVDShape, rounded_branch
from experts.condition import Condition
from experts.config import DiTConfig, ResidualMLPConfig
from experts.networks.model_io import FORMS, save_model
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
    made = SVDLinear(shape)
    made.set_residual(torch.randn(out, inside, generator=generator))
    for buffer in (made.smooth, made.shift, *([made.bias] if bias else [])):
        buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    made.set_low_rank(torch.randn(rank, inside, generator=generator), torch.randn(out, rank, generator=generator))
    return made


@pytest.mark.parametrize(
    "given", [{}, {"rank": 0}, {"branch_bits": 8}, {"bits": 8}, {"is_unsigned": True}, {"bias": False}]
)
def test_it_is_the_sum_of_its_branch_and_its_rounded_residual(given):
    made, x = layer(**given), torch.rand(2, 7, 48)
    smoothed = (x + made.shift) / made.smooth.float()
    down, up = made.low_rank_weights()
    weight = up @ down
    rounded = fake_quantize_groups(smoothed, 4, 16, bool(given.get("is_unsigned")))
    expected = smoothed @ weight.T + rounded @ made.residual().T
    expected = expected if made.bias is None else expected + made.bias
    torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-4)


def test_with_exact_activations_it_is_linear():
    made = layer(activation_bits=None)
    down, up = made.low_rank_weights()
    weight = (up @ down + made.residual()) / made.smooth.float()
    x = torch.randn(5, 48)
    torch.testing.assert_close(made(x), (x + made.shift) @ weight.T + made.bias, rtol=1e-4, atol=1e-4)


def test_four_bits_and_a_thin_branch_take_a_third_of_sixteen_bits():
    made = SVDLinear(
        SVDShape(
            packing=Packing(bits=4, group_size=64, shape=(1536, 384)),
            rank=16,
            branch_bits=16,
            activation_bits=4,
            is_unsigned=False,
            has_bias=True,
        )
    )
    assert sum(buffer.nbytes for buffer in made.buffers()) <= 0.35 * 2 * 1536 * 384


@pytest.mark.parametrize("branch_bits", [8, 16])
def test_the_branch_is_kept_as_it_was_rounded(branch_bits):
    made, generator = layer(branch_bits=branch_bits), torch.Generator().manual_seed(2)
    given = torch.randn(3, 48, generator=generator), torch.randn(20, 3, generator=generator)
    made.set_low_rank(*given)
    for kept, rounded, exact in zip(made.low_rank_weights(), rounded_branch(*given, made.shape), given, strict=True):
        assert torch.equal(kept, rounded)
        torch.testing.assert_close(kept, exact, atol=0.03, rtol=0)


def network():
    torch.manual_seed(0)
    model = build_network(DiTConfig(patch_size=4, heads=2, head_width=16, depth=1), SHAPE, 3).eval()
    for path, found in [item for item in model.named_modules() if type(item[1]) is nn.Linear]:
        model.set_submodule(path, layer(found.in_features, found.out_features))
    return model


def said(model):
    generator = torch.Generator().manual_seed(1)
    noised, t = torch.randn(5, *SHAPE, generator=generator), torch.rand(5, generator=generator)
    with torch.no_grad():
        return call_network(model, noised, t, Condition.null(5))


def test_a_network_is_saved_loaded_and_copied_bit_for_bit(tmp_path):
    model = network()
    save_model(model, tmp_path / "a")
    save_model(load_network(tmp_path / "a"), tmp_path / "b")
    assert torch.equal(said(load_network(tmp_path / "b")), said(model))
    assert torch.equal(said(copy.deepcopy(model)), said(model))


@pytest.mark.parametrize(
    "harm", [{"rank": 99}, {"branch_bits": 4}, {"activation_bits": 5}, {"has_bias": False}, {"packing": {}}]
)
def test_a_damaged_folder_is_refused(harm, tmp_path):
    save_model(network(), tmp_path)
    forms = json.loads((tmp_path / FORMS).read_text())
    path = next(iter(forms))
    (tmp_path / FORMS).write_text(json.dumps(forms | {path: forms[path] | harm}))
    with pytest.raises(CorruptArtifact, match="whole"):
        load_network(tmp_path)


def test_it_does_not_fit_another_place(tmp_path):
    torch.manual_seed(0)
    save_model(build_network(ResidualMLPConfig(width=32, depth=1), SHAPE, 3), tmp_path)
    (tmp_path / FORMS).write_text(json.dumps({"entry": {"kind": "svd_linear"} | layer().settings()}))
    with pytest.raises(CorruptArtifact, match="no linear layer of shape"):
        load_network(tmp_path)
