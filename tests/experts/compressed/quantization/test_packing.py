"""Packed weights: rounding error, size, and folders."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddm_core.artifacts import CorruptArtifact
from ddm_core.json_values import from_json
from experts.compressed.quantization.packed_weight import pack_weight
from experts.compressed.quantization.packing import BITS, Packing, empty_codes_and_scales, pack, unpack
from experts.config import ResidualMLPConfig
from experts.networks.model_io import QUANTIZATION_CONFIG, save_model
from experts.networks.registry import build_network, load_network

SHAPES = st.lists(st.integers(1, 9), min_size=2, max_size=4).map(tuple)
GROUPS = st.sampled_from([2, 6, 8, 64])


@settings(deadline=None)
@given(shape=SHAPES, bits=st.sampled_from(BITS), group=GROUPS, seed=st.integers(0, 99))
def test_packing_error_is_half_a_step_and_idempotent(shape, bits, group, seed):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    packing = Packing(bits=bits, group_size=group, shape=shape)
    codes, scales = pack(weight, packing)
    unpacked = unpack(codes, scales, packing)
    assert unpacked.shape == weight.shape
    steps = scales.float().repeat_interleave(group, dim=1)[:, : weight[0].numel()].reshape(shape)
    # A scale of 16 bits may be too small by 2^-11, or by 2^-25 if it is subnormal, which clips the largest entry.
    scale_error = 2**-10 * weight.abs() + 2 ** (bits - 1) * 2**-25
    assert ((unpacked - weight).abs() <= 0.5 * steps + scale_error + 1e-7).all()
    assert torch.equal(unpack(*pack(unpacked, packing), packing), unpacked)


@settings(deadline=None)
@given(shape=SHAPES, bits=st.sampled_from(BITS), group=GROUPS, scaling=st.sampled_from(["absmax", "mse"]))
def test_packing_predicts_bytes_and_shapes(shape, bits, group, scaling):
    packing = Packing(bits=bits, group_size=group, shape=shape, scaling=scaling)
    parts = pack(torch.randn(shape, generator=torch.Generator().manual_seed(0)), packing)
    assert sum(part.nbytes for part in parts) == packing.nbytes
    assert [(part.shape, part.dtype) for part in parts] == [
        (part.shape, part.dtype) for part in empty_codes_and_scales(packing)
    ]
    assert packing.row_bytes - 1 < packing.groups * group * bits / 8 <= packing.row_bytes


@pytest.mark.parametrize("bits", BITS)
def test_every_level_survives_at_every_bit_position(bits):
    largest = 2 ** (bits - 1) - 1
    levels = torch.randint(-largest, largest + 1, (5, 48), generator=torch.Generator().manual_seed(bits)).float()
    levels[:, ::8] = largest
    packing = Packing(bits=bits, group_size=8, shape=(5, 48))
    assert torch.equal(unpack(*pack(levels, packing), packing), levels)


def test_four_bit_codes_share_bytes_and_zeros_stay_zero():
    packing = Packing(bits=4, group_size=64, shape=(10, 256))
    codes, scales = pack(torch.zeros(10, 256), packing)
    assert codes.nbytes == 10 * 256 / 2 and scales.nbytes == 10 * 256 / 64 * 2
    assert not unpack(codes, scales, packing).any()


@pytest.mark.parametrize(
    ("bits", "numbers", "expected"),
    [
        (8, [127, -127], [255, 1]),
        (4, [7, -7, 0, 1], [0x1F, 0x98]),
        (2, [1, -1, 0, 1], [0b11_10_01_11]),
        (3, [3, -3, 0, 1, 2, -1, 3, -2], [0b00_001_111, 0b1_110_101_1, 0b010_111_01]),
    ],
)
def test_first_number_is_in_the_lowest_bits(bits, numbers, expected):
    packing = Packing(bits=bits, group_size=len(numbers), shape=(1, len(numbers)))
    codes, _ = pack(torch.tensor([numbers]).float(), packing)
    assert codes.tolist() == [expected]


def test_largest_entry_of_a_group_is_exact():
    packing = Packing(bits=4, group_size=4, shape=(1, 8))
    weight = torch.tensor([[7.0, -7.0, 1.0, 0.4, -0.75, 0.25, 0.0, 0.5]])
    expected = torch.tensor([[7.0, -7.0, 1.0, 0.0, -0.75, 0.25, 0.0, 0.5]])
    unpacked = unpack(*pack(weight, packing), packing)
    torch.testing.assert_close(unpacked[:, :4], expected[:, :4], rtol=0, atol=0)
    assert (unpacked[:, 4:] - expected[:, 4:]).abs().max() <= 0.75 / 14 + 1e-3


def errors(weight, bits):
    """Return the squared error of every group, by scaling."""
    by_scaling = {}
    for scaling in ("absmax", "mse"):
        packing = Packing(bits=bits, group_size=16, shape=tuple(weight.shape), scaling=scaling)
        by_scaling[scaling] = (unpack(*pack(weight, packing), packing) - weight).square().reshape(-1, 16).sum(1)
    return by_scaling


@pytest.mark.parametrize("bits", BITS)
def test_mse_scale_never_increases_a_group_error(bits):
    losses = errors(torch.randn(64, 128, generator=torch.Generator().manual_seed(1)), bits)
    assert (losses["mse"] <= losses["absmax"] * (1 + 1e-5) + 1e-12).all()
    assert losses["mse"].sum() < losses["absmax"].sum() * (0.45 if bits == 2 else 1)


def test_mse_scale_uses_all_levels_of_two_bits():
    weight = torch.tensor([[-2.0, -1.0, 0.0, 1.0], [2.0, 1.0, 0.0, -1.0]])
    packing = Packing(bits=2, group_size=4, shape=(2, 4), scaling="mse")
    assert torch.equal(unpack(*pack(weight, packing), packing), weight)
    assert not unpack(*pack(torch.zeros(2, 4), packing), packing).any()


def test_packing_without_scaling_defaults_to_absmax():
    assert from_json(Packing, {"bits": 4, "group_size": 64, "shape": [2, 3]}).scaling == "absmax"


@pytest.mark.parametrize("change", [{"bits": 7}, {"group_size": 3}, {"shape": [4]}, {"scaling": "nearest"}])
def test_invalid_packing_is_refused(change):
    with pytest.raises(ValueError, match=r"^Packing(: a packing needs|\.(bits|scaling): Input should be)"):
        from_json(Packing, {"bits": 4, "group_size": 64, "shape": [2, 3]} | change)


NAME = "blocks.0.inner.weight"
PATH = "blocks.0.inner.parametrizations.weight.0"


@pytest.fixture(params=BITS)
def packed(request, tmp_path):
    """Return a folder with one packed weight, and the saved model."""
    torch.manual_seed(0)
    model = build_network(ResidualMLPConfig(width=32, depth=1), (16,), 3).eval()
    torch.nn.init.normal_(model.exit.weight)
    shape = tuple(model.get_parameter(NAME).shape)
    pack_weight(model, NAME, Packing(bits=request.param, group_size=32, shape=shape, scaling="mse"))
    save_model(model, tmp_path)
    return tmp_path, model


def test_packed_folder_loads_bit_for_bit(packed):
    folder, model = packed
    loaded = load_network(folder)
    noised, t, labels = torch.randn(4, 16), torch.rand(4), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        assert torch.equal(loaded(noised, t, labels), model(noised, t, labels))


@pytest.mark.parametrize("change", [{"bits": 7}, {"shape": [7, 7]}, {"group_size": 6}])
def test_damaged_packed_folder_is_refused(packed, change):
    folder, _ = packed
    config = json.loads((folder / QUANTIZATION_CONFIG).read_text())
    (folder / QUANTIZATION_CONFIG).write_text(json.dumps({PATH: config[PATH] | change}))
    with pytest.raises(CorruptArtifact, match="complete"):
        load_network(folder)
