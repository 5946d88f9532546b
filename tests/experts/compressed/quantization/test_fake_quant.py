"""Fake quantization: rounding grids and gradients."""

import pytest
import torch

from experts.compressed.quantization.fake_quant import (
    encode_with_scales,
    fake_quantize_at,
    fake_quantize_groups,
    fake_quantize_weight,
    search_grids,
)
from experts.compressed.quantization.packing import Packing, pack, unpack


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("is_unsigned", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_groups_are_rounded_independently_on_their_levels(bits, is_unsigned):
    x = draws(3, 5, 100)
    x = x.abs() if is_unsigned else x
    rounded = fake_quantize_groups(x, bits, 32, is_unsigned)
    largest = x[0, 0, :32].abs().amax()
    levels = 2**bits - 1 if is_unsigned else 2 ** (bits - 1) - 1
    numbers = rounded[0, 0, :32] / largest * levels
    torch.testing.assert_close(numbers, numbers.round(), rtol=0, atol=1e-3)
    assert (rounded - x)[0, 0, :32].abs().amax() <= largest / levels / 2 * 1.001
    x[..., 32:] *= 100
    assert torch.equal(fake_quantize_groups(x, bits, 32, is_unsigned)[..., :32], rounded[..., :32])


def test_zeros_stay_zero_and_unsigned_values_nonnegative():
    assert not fake_quantize_groups(torch.zeros(2, 70), 4, 64, False).any()
    assert not fake_quantize_groups(-draws(2, 64).abs(), 4, 64, True).any()


def test_gradients_equal_those_of_lsq():
    x = torch.tensor([-9.0, -0.6, 0.2, 0.7, 9.0], requires_grad=True)
    step = torch.tensor(0.5, requires_grad=True)
    rounded = fake_quantize_at(x, step, torch.tensor(8.0), 4)
    assert rounded.tolist() == [-4.0, -0.5, 0.0, 0.5, 3.5]
    rounded.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
    inside = sum(round(value / 0.5) - value / 0.5 for value in (-0.6, 0.2, 0.7))
    assert step.grad.item() == pytest.approx(-8 + 7 + inside, abs=1e-5)


def test_searched_grid_beats_full_range_and_contains_zero():
    samples = torch.stack([draws(4000), draws(4000, seed=1).abs() + 2, -(draws(4000, seed=2) ** 2)])
    steps, zeros = search_grids(samples, 4)
    rounded = fake_quantize_at(samples, steps[:, None], zeros[:, None], 4)
    low, high = samples.amin(1).clamp_max(0), samples.amax(1).clamp_min(0)
    full_range_steps = (high - low) / 15
    full_range = fake_quantize_at(samples, full_range_steps[:, None], (-low / full_range_steps).round()[:, None], 4)
    assert ((rounded - samples).square().mean(1) <= (full_range - samples).square().mean(1)).all()
    assert torch.equal(zeros, zeros.round()) and (zeros >= 0).all() and (zeros <= 15).all()
    assert not fake_quantize_at(torch.zeros(3, 1), steps[:, None], zeros[:, None], 4).any()


@pytest.mark.parametrize("shape", [(5, 9), (4, 3, 3, 3), (6, 16)])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_with_fixed_scales_decode_to_rounded_weight(shape, bits):
    weight, entries = draws(*shape), draws(*shape)[0].numel()
    packing = Packing(bits=bits, group_size=entries + entries % 2, shape=shape, scaling="mse")
    codes, scales = pack(weight, packing)
    assert torch.equal(encode_with_scales(weight, scales, packing), codes)
    assert torch.equal(
        unpack(encode_with_scales(weight * 1.3, scales, packing), scales, packing).float(),
        fake_quantize_weight(weight * 1.3, scales, bits),
    )


def test_weight_gradient_passes_where_not_clipped():
    weight = torch.tensor([[0.3, 5.0, -0.9]], requires_grad=True)
    fake_quantize_weight(weight, torch.tensor([[0.5]], dtype=torch.float16), 4).sum().backward()
    assert weight.grad.tolist() == [[1, 0, 1]]
