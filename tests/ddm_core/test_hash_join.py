"""Hashes are found among others on the disk, whatever fits in memory."""

import numpy as np
import pytest

from ddm_core import hash_join
from ddm_core.files.memmaps import create_memmap
from ddm_core.hash_join import NOT_FOUND, find_positions


@pytest.mark.parametrize("max_rows", [None, 1000, 7])
@pytest.mark.parametrize("block_rows", [2**20, 64])
def test_positions_are_those_of_a_dictionary(tmp_path, monkeypatch, max_rows, block_rows):
    monkeypatch.setattr(hash_join, "BLOCK_ROWS", block_rows)
    draws = np.random.default_rng(0)
    known = draws.integers(-(2**63), 2**63, 500)
    known[[17, 200, 499]] = known[3], -(2**63), 2**63 - 1
    wanted = np.concatenate([draws.permutation(known), draws.integers(-(2**63), 2**63, 100)])
    found = create_memmap(tmp_path / "found.npy", np.int64, (len(wanted),))
    repeated = find_positions(known, wanted, found, max_rows)
    first = {value: row for row, value in reversed(list(enumerate(known.tolist())))}
    assert found.tolist() == [first.get(value, NOT_FOUND) for value in wanted.tolist()]
    assert repeated == 17


def test_nothing_is_found_among_nothing():
    found = np.zeros(3, np.int64)
    assert find_positions(np.zeros(0, np.int64), np.arange(3), found) == NOT_FOUND
    assert found.tolist() == [NOT_FOUND] * 3


def test_hashes_of_a_pass_are_as_many_as_fit(monkeypatch):
    sizes, argsort = [], np.argsort
    monkeypatch.setattr(np, "argsort", lambda values, kind: sizes.append(len(values)) or argsort(values, kind=kind))
    known = np.random.default_rng(1).integers(-(2**63), 2**63, 50_000)
    find_positions(known, known, np.zeros_like(known), 1000)
    assert len(sizes) == 50 and sum(sizes) == len(known) and max(sizes) < 1200
