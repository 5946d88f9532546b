"""Shared weights: one base for all experts, a delta for each, and a folder of bases."""

import json
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddm_core.artifacts import CorruptArtifact
from ddm_core.json_values import from_json
from experts.compressed.quantization.packing import BITS
from experts.compressed.quantization.shared_weight import (
    DELTA,
    FULL,
    LEFT,
    RIGHT,
    MatrixFormat,
    SharedBase,
    SharedWeightConfig,
    StoredMatrix,
    share_weight,
    shared_weights,
    weight_name,
)
from experts.compressed.quantization.shared_weight_io import (
    INDEX,
    TENSORS,
    collect_bases,
    link_bases,
    load_bases,
    save_bases,
)
from experts.config import ResidualMLPConfig
from experts.networks.model_io import save_model
from experts.networks.registry import build_network, load_network

NAME, SHAPE = "blocks.0.inner.weight", (32, 32)
ROWS = torch.randn(4, 16), torch.rand(4), torch.tensor([0, 1, 2, 3])


def stored(values, bits=16):
    return StoredMatrix.from_matrix(values, MatrixFormat(bits=bits, group_size=8, shape=tuple(values.shape)))


def create_config(delta="packed", **changes):
    return SharedWeightConfig(**({"delta": delta, "bits": 8, "group_size": 8, "shape": SHAPE} | changes))


@pytest.fixture
def pair():
    """Return a base and two models with packed deltas to it."""
    torch.manual_seed(0)
    base, models = SharedBase({FULL: stored(torch.randn(SHAPE), 8)}), []
    for _ in range(2):
        model = build_network(ResidualMLPConfig(width=32, depth=1), (16,), 3).eval()
        torch.nn.init.normal_(model.exit.weight)
        share_weight(model, NAME, create_config(), base, {DELTA: 0.1 * torch.randn(SHAPE)})
        models.append(model)
    return base, models


@pytest.mark.parametrize("bits", [*BITS, 16])
def test_stored_matrix_has_expected_error_and_size(bits):
    values = torch.randn(16, 3, 8, generator=torch.Generator().manual_seed(0))
    matrix = stored(values, bits)
    assert matrix.nbytes == 16 * 24 * bits / 8 + (0 if bits == 16 else 16 * 24 / 8 * 2)
    assert (matrix() - values).norm() / values.norm() < {16: 1e-3}.get(bits, 2.0**-bits * 2)


def test_weight_is_base_plus_delta():
    model = build_network(ResidualMLPConfig(width=32, depth=1), (16,), 3)
    full, left, right = torch.randn(SHAPE).half().float(), torch.randn(4, 32).half().float(), torch.randn(4, 32)
    right = right.half().float()
    base = SharedBase({FULL: stored(full)})
    share_weight(model, NAME, create_config("low_rank", bits=16, rank=4), base, {LEFT: left, RIGHT: right})
    torch.testing.assert_close(model.blocks[0].inner.weight, full + left.T @ right)
    assert dict(shared_weights(model))[NAME].base is base


def test_directions_are_scaled_by_expert_coefficients():
    model = build_network(ResidualMLPConfig(width=32, depth=1), (16,), 3)
    left, right = torch.eye(32)[:6], torch.eye(32)[2:8]
    base, coefficients = SharedBase({LEFT: stored(left), RIGHT: stored(right)}), torch.arange(6.0)
    none = {LEFT: torch.zeros(1, 32), RIGHT: torch.zeros(1, 32)}
    share_weight(model, NAME, create_config("tailors", rank=1, directions=6), base, none, coefficients)
    torch.testing.assert_close(model.blocks[0].inner.weight, left.T @ coefficients.diag() @ right)


def test_base_is_shared_by_copies_and_not_in_state_dict(pair):
    base, models = pair
    keys = [key for key in models[0].state_dict() if key.startswith("blocks.0.inner")]
    assert sorted(key.rpartition("inner.")[2] for key in keys) == [
        "bias",
        "parametrizations.weight.0.parts.own.codes",
        "parametrizations.weight.0.parts.own.scales",
        "parametrizations.weight.original",
    ]
    copied = deepcopy(models[0])
    assert dict(shared_weights(copied))[NAME].base is base
    assert collect_bases([*models, copied]) == {NAME: base}


def test_loaded_and_linked_models_are_bit_identical(pair, tmp_path):
    _, models = pair
    save_bases(collect_bases(models), tmp_path / "shared")
    bases = load_bases(tmp_path / "shared")
    for number, model in enumerate(models):
        save_model(model, tmp_path / str(number))
        loaded = load_network(tmp_path / str(number))
        with pytest.raises(RuntimeError, match="load the ensemble's whole folder"):
            loaded(*ROWS)
        assert link_bases(loaded, bases) == 1
        with torch.no_grad():
            assert torch.equal(loaded(*ROWS), model(*ROWS))
        assert dict(shared_weights(loaded))[NAME].base is bases[NAME]


def test_model_without_its_base_is_refused(pair, tmp_path):
    _, models = pair
    save_model(models[0], tmp_path)
    loaded = load_network(tmp_path)
    with pytest.raises(ValueError, match="without its base"):
        collect_bases([loaded])
    with pytest.raises(CorruptArtifact, match=f"shares {NAME} with others"):
        link_bases(loaded, {})
    with pytest.raises(CorruptArtifact, match="of its weight; got"):
        link_bases(loaded, {NAME: SharedBase({FULL: stored(torch.zeros(8, 32))})})


def test_experts_of_two_ensembles_cannot_be_saved_together(pair):
    _, models = pair
    other = deepcopy(models[1])
    dict(shared_weights(other))[NAME].link(SharedBase({FULL: stored(torch.zeros(SHAPE))}))
    with pytest.raises(ValueError, match="experts of two ensembles share"):
        collect_bases([models[0], other])


@pytest.mark.parametrize("damage", ["tensor", "more", "bits", "parts", "list", "file"])
def test_damaged_folder_is_refused(pair, tmp_path, damage):
    base, _ = pair
    save_bases({NAME: base}, tmp_path)
    tensors, index = load_file(tmp_path / TENSORS), json.loads((tmp_path / INDEX).read_text())
    if damage == "tensor":
        del tensors[f"{NAME}.{FULL}.scales"]
    if damage == "more":
        tensors["more"] = torch.zeros(1)
    save_file(tensors, tmp_path / TENSORS)
    entry = index[NAME][FULL]
    changed = {"bits": {NAME: {FULL: entry | {"bits": 4}}}, "parts": {NAME: {LEFT: entry}}, "list": []}
    (tmp_path / INDEX).write_text(json.dumps(changed.get(damage, index)))
    if damage == "file":
        (tmp_path / TENSORS).unlink()
    with pytest.raises(CorruptArtifact, match="make the ensemble again"):
        load_bases(tmp_path)


@pytest.mark.parametrize(
    "change", [{"delta": "none"}, {"rank": 0}, {"directions": 3}, {"bits": 7}, {"shape": [4]}, {"group_size": 3}]
)
def test_invalid_shared_weight_config_is_refused(change):
    settings = {"delta": "low_rank", "bits": 8, "group_size": 8, "shape": [4, 4], "rank": 2, "directions": 0}
    assert from_json(SharedWeightConfig, settings).matrix == (4, 4)
    message = r"^SharedWeightConfig(: a (packing|shared weight) needs|\.delta: Input should)"
    with pytest.raises(ValueError, match=message):
        from_json(SharedWeightConfig, settings | change)


def test_weight_name_is_read_from_parametrization_path():
    assert weight_name("a.b.parametrizations.weight.0") == "a.b.weight"
    assert weight_name("parametrizations.weight.0") == "weight"
    with pytest.raises(ValueError, match="not the path"):
        weight_name("a.b.weight")
