"""Shared weights: a base that is there once, differences that are each expert's own, and a folder that holds it."""

import json
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddm_core.artifacts import CorruptArtifact
from experts.compressed.quantization.packing import BITS
from experts.compressed.quantization.shared_weight import (
    LEFT,
    OWN,
    RIGHT,
    WHOLE,
    MatrixFormat,
    SharedBase,
    SharedWeightConfig,
    StoredMatrix,
    share_weight,
    shared_weights,
    weight_name,
)
from experts.compressed.quantization.shared_weight_io import DESCRIBED, TENSORS, bases_of, link, load_bases, save_bases
from experts.config import ResidualMLPConfig
from experts.networks.model_io import save_model
from experts.networks.registry import build_network, load_network

NAME, SHAPE = "blocks.0.inner.weight", (32, 32)
ROWS = torch.randn(4, 16), torch.rand(4), torch.tensor([0, 1, 2, 3])


def stored(values, bits=16):
    return StoredMatrix.from_matrix(values, MatrixFormat(bits=bits, group_size=8, shape=tuple(values.shape)))


def sharing(difference="packed", **given):
    return SharedWeightConfig(**({"delta": difference, "bits": 8, "group_size": 8, "shape": SHAPE} | given))


@pytest.fixture
def pair():
    """Two models with a base and their own packed differences."""
    torch.manual_seed(0)
    base, models = SharedBase({WHOLE: stored(torch.randn(SHAPE), 8)}), []
    for _ in range(2):
        model = build_network(ResidualMLPConfig(width=32, depth=1), (16,), 3).eval()
        torch.nn.init.normal_(model.exit.weight)
        share_weight(model, NAME, sharing(), base, {OWN: 0.1 * torch.randn(SHAPE)})
        models.append(model)
    return base, models


@pytest.mark.parametrize("bits", [*BITS, 16])
def test_a_stored_matrix_is_near_and_as_small_as_it_says(bits):
    values = torch.randn(16, 3, 8, generator=torch.Generator().manual_seed(0))
    matrix = stored(values, bits)
    assert matrix.nbytes == 16 * 24 * bits / 8 + (0 if bits == 16 else 16 * 24 / 8 * 2)
    assert (matrix() - values).norm() / values.norm() < {16: 1e-3}.get(bits, 2.0**-bits * 2)


def test_a_weight_is_base_plus_difference():
    model = build_network(ResidualMLPConfig(width=32, depth=1), (16,), 3)
    whole, left, right = torch.randn(SHAPE).half().float(), torch.randn(4, 32).half().float(), torch.randn(4, 32)
    right = right.half().float()
    base = SharedBase({WHOLE: stored(whole)})
    share_weight(model, NAME, sharing("low_rank", bits=16, rank=4), base, {LEFT: left, RIGHT: right})
    torch.testing.assert_close(model.blocks[0].inner.weight, whole + left.T @ right)
    assert dict(shared_weights(model))[NAME].base is base


def test_directions_are_scaled_by_an_experts_own_coefficients():
    model = build_network(ResidualMLPConfig(width=32, depth=1), (16,), 3)
    left, right = torch.eye(32)[:6], torch.eye(32)[2:8]
    base, coefficients = SharedBase({LEFT: stored(left), RIGHT: stored(right)}), torch.arange(6.0)
    none = {LEFT: torch.zeros(1, 32), RIGHT: torch.zeros(1, 32)}
    share_weight(model, NAME, sharing("tailors", rank=1, directions=6), base, none, coefficients)
    torch.testing.assert_close(model.blocks[0].inner.weight, left.T @ coefficients.diag() @ right)


def test_the_base_is_in_no_state_dict_and_copies_of_an_expert_keep_to_it(pair):
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
    assert bases_of([*models, copied]) == {NAME: base}


def test_saved_loaded_and_linked_the_models_say_the_same_to_the_bit(pair, tmp_path):
    _, models = pair
    save_bases(bases_of(models), tmp_path / "shared")
    bases = load_bases(tmp_path / "shared")
    for number, model in enumerate(models):
        save_model(model, tmp_path / str(number))
        again = load_network(tmp_path / str(number))
        with pytest.raises(RuntimeError, match="load the ensemble's whole folder"):
            again(*ROWS)
        assert link(again, bases) == 1
        with torch.no_grad():
            assert torch.equal(again(*ROWS), model(*ROWS))
        assert dict(shared_weights(again))[NAME].base is bases[NAME]


def test_a_model_without_its_base_is_refused(pair, tmp_path):
    _, models = pair
    save_model(models[0], tmp_path)
    again = load_network(tmp_path)
    with pytest.raises(ValueError, match="without its base"):
        bases_of([again])
    with pytest.raises(CorruptArtifact, match=f"shares {NAME} with others"):
        link(again, {})
    with pytest.raises(CorruptArtifact, match="under a weight of"):
        link(again, {NAME: SharedBase({WHOLE: stored(torch.zeros(8, 32))})})


def test_experts_of_two_ensembles_are_not_saved_as_one(pair):
    _, models = pair
    other = deepcopy(models[1])
    dict(shared_weights(other))[NAME].link(SharedBase({WHOLE: stored(torch.zeros(SHAPE))}))
    with pytest.raises(ValueError, match="experts of two ensembles share"):
        bases_of([models[0], other])


@pytest.mark.parametrize("harm", ["tensor", "more", "bits", "parts", "list", "file"])
def test_a_damaged_folder_is_refused(pair, tmp_path, harm):
    base, _ = pair
    save_bases({NAME: base}, tmp_path)
    tensors, described = load_file(tmp_path / TENSORS), json.loads((tmp_path / DESCRIBED).read_text())
    if harm == "tensor":
        del tensors[f"{NAME}.{WHOLE}.scales"]
    if harm == "more":
        tensors["more"] = torch.zeros(1)
    save_file(tensors, tmp_path / TENSORS)
    whole = described[NAME][WHOLE]
    changed = {"bits": {NAME: {WHOLE: whole | {"bits": 4}}}, "parts": {NAME: {LEFT: whole}}, "list": []}
    (tmp_path / DESCRIBED).write_text(json.dumps(changed.get(harm, described)))
    if harm == "file":
        (tmp_path / TENSORS).unlink()
    with pytest.raises(CorruptArtifact, match="make the ensemble again"):
        load_bases(tmp_path)


@pytest.mark.parametrize(
    "harm", [{"delta": "none"}, {"rank": 0}, {"directions": 3}, {"bits": 7}, {"shape": [4]}, {"group_size": 3}]
)
def test_a_shared_weight_that_nobody_wrote_is_refused(harm):
    settings = {"delta": "low_rank", "bits": 8, "group_size": 8, "shape": [4, 4], "rank": 2, "directions": 0}
    assert SharedWeightConfig.parsed(settings).matrix == (4, 4)
    with pytest.raises(ValueError, match="a packing of|a shared weight of"):
        SharedWeightConfig.parsed(settings | harm)


def test_the_name_of_a_weight_is_read_from_its_forms_path():
    assert weight_name("a.b.parametrizations.weight.0") == "a.b.weight"
    assert weight_name("parametrizations.weight.0") == "weight"
    with pytest.raises(ValueError, match="not the path"):
        weight_name("a.b.weight")
