"""Rounded attention: its parts equal torch's attention, and each operand has its own grid."""

import copy

import pytest
import torch
from torch.nn import functional

from benchmarks.testbed.backbones import TINY, build, inputs
from experts.compressed.quantization.attention_quant import (
    OPERANDS,
    AttentionProducts,
    attention_layers,
    quantize_operand,
)
from experts.networks.registry import call_network

CASE = "DiTTransformer2DModel"


def rounded(case, bits=8):
    model = build(case)
    layers = [path for path in attention_layers(model)]
    for path in layers:
        for operand in OPERANDS:
            quantizer = quantize_operand(model, path, operand, 2, 1, bits)
            zero = 0 if operand == "probability" else 2 ** (bits - 1)
            step = 1 / (2**bits - 1) if operand == "probability" else 0.02
            quantizer.set_grids(
                torch.tensor([0.0, 1000.0]), (torch.full((2, 1), step), torch.full((2, 1), float(zero)))
            )
    return model, layers


@pytest.mark.parametrize("mask", [None, "boolean", "added"])
def test_parts_equal_torchs_attention(mask):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, size, 4, generator=generator) for size in (5, 7, 7))
    is_read = torch.rand(2, 1, 5, 7, generator=generator) < 0.6
    is_read[0, 0, 2] = False
    masks = {None: None, "boolean": is_read, "added": is_read.float() * 2}
    arguments = {"attn_mask": masks[mask], "scale": 0.3}
    expected = functional.scaled_dot_product_attention(query, key, value, **arguments)
    seen = {}
    with AttentionProducts(lambda name, x: seen.setdefault(name, x)) as products:
        found = functional.scaled_dot_product_attention(query, key, value, **arguments)
    torch.testing.assert_close(found, expected)
    assert products.calls == 1 and [*seen] == [*OPERANDS]
    assert seen["key"].shape == (2, 7, 12) and seen["probability"].shape == (2, 3, 5, 7)


def test_attention_that_cannot_be_computed_in_parts_is_refused():
    x = torch.zeros(1, 1, 2, 2)
    with AttentionProducts(lambda name, x: x), pytest.raises(ValueError, match="causal"):
        functional.scaled_dot_product_attention(x, x, x, is_causal=True)


@pytest.mark.parametrize("case", TINY)
def test_every_class_computes_attention_by_the_rounded_operands(case):
    model, layers = rounded(case)
    seen = set()
    for path in layers:
        for operand in OPERANDS:
            quantizer = model.get_submodule(f"{path}.timed_{operand}")
            quantizer.register_forward_hook(lambda module, args, output, place=(path, operand): seen.add(place))
    with torch.no_grad():
        if case.startswith("Sana"):  # its attention over the image has no probabilities
            with pytest.raises(RuntimeError, match="attention backend"):
                call_network(model, *inputs(case))
            return
        call_network(model, *inputs(case))
    assert seen == {(path, operand) for path in layers for operand in OPERANDS}


def test_eight_bits_change_the_output_little_and_four_bits_more():
    exact, arguments = build(CASE), inputs(CASE)
    with torch.no_grad():
        expected = call_network(exact, *arguments)
        errors = [float((call_network(rounded(CASE, bits)[0], *arguments) - expected).norm()) for bits in (8, 4)]
    assert 0 < errors[0] < 0.5 * errors[1] < 0.1 * float(expected.norm())


def test_nothing_is_rounded_after_the_call_or_an_error_in_it():
    model, layers = rounded(CASE)
    twin, x = copy.deepcopy(model), torch.randn(1, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    model.get_submodule(layers[0]).timed_value.recorder.timestep = None
    with pytest.raises(RuntimeError, match="one timestep a row"), torch.no_grad():
        model.get_submodule(layers[0])(torch.zeros(1, 3, model.get_submodule(layers[0]).to_q.in_features))
    expected = functional.softmax(x @ x.transpose(-1, -2) / 2, -1) @ x
    torch.testing.assert_close(functional.scaled_dot_product_attention(x, x, x), expected)
    with torch.no_grad():
        assert torch.equal(call_network(twin, *inputs(CASE)), call_network(model, *inputs(CASE)))


def test_an_operand_is_refused_twice_or_outside_attention():
    model, layers = rounded(CASE)
    for path, operand in ((layers[0], "key"), (layers[0], "mask"), ("pos_embed", "key")):
        with pytest.raises(ValueError, match="must be an attention layer"):
            quantize_operand(model, path, operand, 2, 1, 4)
