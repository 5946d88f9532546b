"""Packed weights: how far rounding moves them, what they weigh, and folders that hold them."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from artifacts import CorruptArtifact
from experts.config import ResidualMLPConfig
from experts.model_folder import PACKED, PACKING, pack_folder, save_model
from experts.networks import build_network, load_network
from experts.packing import Packing, pack, unpack

SHAPES = st.lists(st.integers(1, 9), min_size=2, max_size=4).map(tuple)


@settings(deadline=None)
@given(shape=SHAPES, bits=st.sampled_from([4, 8]), group=st.sampled_from([2, 8, 64]), seed=st.integers(0, 99))
def test_no_entry_moves_by_more_than_half_a_step_and_rounding_twice_is_rounding_once(shape, bits, group, seed):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    packing = Packing(bits=bits, group=group, shape=shape)
    codes, scales = pack(weight, packing)
    again = unpack(codes, scales, packing)
    assert again.shape == weight.shape
    steps = scales.float().repeat_interleave(group, dim=1)[:, : weight[0].numel()].reshape(shape)
    # A scale of 16 bits may be too small by 2^-11, so that the largest entry is clipped by as much.
    assert ((again - weight).abs() <= 0.5 * steps + 2**-10 * weight.abs() + 1e-7).all()
    assert torch.equal(unpack(*pack(again, packing), packing), again)


def test_two_numbers_of_four_bits_share_a_byte_and_zeros_stay_zero():
    packing = Packing(bits=4, group=64, shape=(10, 256))
    codes, scales = pack(torch.zeros(10, 256), packing)
    assert codes.nbytes == 10 * 256 / 2 and scales.nbytes == 10 * 256 / 64 * 2
    assert not unpack(codes, scales, packing).any()


def test_the_largest_entry_of_a_group_is_kept_and_its_sign():
    packing = Packing(bits=4, group=4, shape=(1, 8))
    weight = torch.tensor([[7.0, -7.0, 1.0, 0.4, -0.75, 0.25, 0.0, 0.5]])
    expected = torch.tensor([[7.0, -7.0, 1.0, 0.0, -0.75, 0.25, 0.0, 0.5]])
    again = unpack(*pack(weight, packing), packing)
    torch.testing.assert_close(again[:, :4], expected[:, :4], rtol=0, atol=0)
    assert (again[:, 4:] - expected[:, 4:]).abs().max() <= 0.75 / 14 + 1e-3


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    save_model(build_network(ResidualMLPConfig(width=32, depth=1), (16,), 3), tmp_path)
    return tmp_path


def test_a_packed_folder_is_small_and_loads_as_the_rounded_network(folder):
    whole = load_network(folder).state_dict()
    before = sum(path.stat().st_size for path in folder.iterdir())
    count = pack_folder(folder, 4, 32, 256)
    packings = json.loads((folder / PACKING).read_text())
    assert count == len(packings) > 0 and not list(folder.glob("diffusion_pytorch_model*"))
    assert sum(path.stat().st_size for path in folder.iterdir()) < 0.5 * before
    for name, found in load_network(folder).state_dict().items():
        if name in packings:
            packing = Packing.parsed(packings[name])
            assert torch.equal(found, unpack(*pack(whole[name], packing), packing))
        else:
            assert torch.equal(found, whole[name])


def test_with_no_matrix_large_enough_nothing_changes(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert pack_folder(folder, 8, 32, 10**9) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_what_is_packed_is_not_packed_again(folder):
    pack_folder(folder, 8, 32, 256)
    with pytest.raises(ValueError, match="packed already"):
        pack_folder(folder, 4, 32, 256)


@pytest.mark.parametrize("harm", ["scales", "packing", "bits", "shape", "list"])
def test_a_damaged_packed_folder_is_refused(folder, harm):
    pack_folder(folder, 4, 32, 256)
    found, packings = load_file(folder / PACKED), json.loads((folder / PACKING).read_text())
    name = next(iter(packings))
    if harm == "scales":
        del found[f"{name}.scales"]
        save_file(found, folder / PACKED)
    changed = {
        "scales": packings,
        "packing": {key: value for key, value in packings.items() if key != name},
        "bits": packings | {name: packings[name] | {"bits": 3}},
        "shape": packings | {name: packings[name] | {"shape": [7, 7]}},
        "list": [],
    }[harm]
    (folder / PACKING).write_text(json.dumps(changed))
    with pytest.raises(CorruptArtifact, match="whole"):
        load_network(folder)
