"""SVDQuant: what each of its parts is worth on outliers, and on a trained transformer."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from ddm_core.artifacts import Preempted, Workspace, checksum, files_in
from ensemble.compression.common.calibration_data import calibration_batches, run_network
from ensemble.compression.method import StageError
from ensemble.compression.quantization.config import SVDQuantConfig
from ensemble.compression.quantization.layers import quantizable_layers
from ensemble.compression.quantization.svd_search import low_rank, search
from ensemble.compression.quantization.svdquant import quantize_svdquant
from experts.compressed.quantization.svd_linear import SVDLinear
from experts.expert import Expert
from tests.ensemble.compression.trained import digits, trained

SMALL = SVDQuantConfig(rank=8, group_size=16, rank_share=1, rows=32, tokens=256, refine=12, grid=10, min_elements=256)
PARTS = {
    "naive": replace(SMALL, smooth=False, rank=0, refine=0),
    "smooth": replace(SMALL, rank=0, refine=0),
    "branch": replace(SMALL, smooth=False, refine=0),
    "both": replace(SMALL, refine=0),
    "all": SMALL,
}


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    return trained("dit", Workspace.at(tmp_path_factory.mktemp("dit")))


def outliers(width=128):
    """A layer some of whose inputs are forty times as large as the others."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(width, width)
    linear.weight.data = torch.randn(width, width, generator=generator) * width**-0.5
    x = torch.randn(400, width, generator=generator)
    x[:, ::32] *= 40
    return linear, x[:200], x[200:]


def error(linear, layer, x):
    with torch.no_grad():
        exact = linear(x) - linear.bias
        return ((layer(x) - linear(x)).norm() / exact.norm()).item()


def test_with_outliers_the_whole_is_twice_as_good_as_either_part():
    linear, x, fresh = outliers()
    config = SVDQuantConfig(rank=16, rank_share=1)
    parts = {
        "naive": replace(config, smooth=False, rank=0),
        "smooth": replace(config, rank=0),
        "branch": replace(config, smooth=False, refine=0),
        "all": config,
    }
    errors = {name: error(linear, search(linear, x, part).layer, fresh) for name, part in parts.items()}
    assert errors["all"] <= 0.5 * min(errors["smooth"], errors["branch"]) and errors["smooth"] < errors["naive"]


def test_what_is_said_of_a_layer_is_what_it_does_and_refining_never_harms():
    linear, x, _ = outliers(64)
    found = search(linear, x, replace(SMALL, refine=50))
    assert error(linear, found.layer, x) == pytest.approx(found.errors[-1], rel=1e-3)
    assert len(found.errors) > 1 and list(found.errors) == sorted(found.errors, reverse=True)


@pytest.mark.parametrize("has_bias", [True, False])
def test_inputs_that_hardly_reach_below_zero_are_shifted_and_need_no_sign(has_bias):
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(64, 32, bias=has_bias)
    x = nn.functional.gelu(3 * torch.randn(300, 64, generator=generator))
    found = search(linear, x, replace(SMALL, bits=8, activation_bits=8)).layer
    assert found.shape.is_unsigned and found.shift.item() == pytest.approx(-x.amin().item())
    with torch.no_grad():
        assert ((found(x) - linear(x)).norm() / linear(x).norm()).item() < 0.01
    assert not search(linear, x - 3, SMALL).layer.shape.is_unsigned


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (16, 16)])
def test_the_branch_is_the_truncated_singular_value_decomposition(shape):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    up, down = low_rank(weight, 5)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(up @ down, (u[:, :5] * s[:5]) @ v[:5], rtol=1e-3, atol=1e-4)
    assert [factor.shape for factor in low_rank(weight, 0)] == [(shape[0], 0), (0, shape[1])]


@pytest.mark.slow
def test_on_a_trained_transformer_every_part_helps(dit, tmp_path):
    def found(part):
        return quantize_svdquant(dit, digits(), replace(part, rest_bits=None), Workspace.at(tmp_path)).details[
            "output_error"
        ]

    errors = {name: found(part) for name, part in PARTS.items()}
    assert errors["all"] <= 0.6 * errors["naive"]
    assert errors["all"] <= 0.9 * min(errors["smooth"], errors["branch"])


@pytest.mark.slow
def test_layers_that_are_told_the_time_may_have_a_branch_too_and_the_others_stay(dit, tmp_path):
    small = replace(SMALL, rest_bits=4, refine=2, grid=2, min_elements=256)
    plain, told = (
        quantize_svdquant(dit, digits(), replace(small, time_embedding=split), Workspace.at(tmp_path)).details
        for split in (False, True)
    )
    assert told["output_error_of_layers"] == plain["output_error_of_layers"]
    assert told["output_error"] < 1.1 * plain["output_error"]
    assert set(told["layers"]) - set(plain["layers"]) == set(quantizable_layers(dit.model, "time_embedding"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mlp", "unet", "dit"])
def test_only_the_named_layers_are_replaced_and_the_folder_gives_the_same_bits(kind, dit, tmp_path):
    expert = dit if kind == "dit" else trained(kind, Workspace.at(tmp_path / "train"), 20)
    before = {name: value.clone() for name, value in expert.model.state_dict().items()}
    outcome = quantize_svdquant(expert, digits(), replace(SMALL, refine=2, grid=2), Workspace.at(tmp_path / "work"))
    assert all(torch.equal(value, before[name]) for name, value in expert.model.state_dict().items())
    model = outcome.expert.model
    replaced = [path for path, module in model.named_modules() if isinstance(module, SVDLinear)]
    assert replaced == quantizable_layers(expert.model, "attention", "feed_forward") and outcome.flops > 0
    assert outcome.modules == len(replaced) + outcome.details["weights_stored_in_few_bits"] > len(replaced)
    expert.save(tmp_path / "whole")
    outcome.expert.save(tmp_path / "small")
    batch = calibration_batches(digits(), 8, 1, 1)[0]
    with torch.no_grad():
        again = run_network(Expert.load(tmp_path / "small").model, expert, batch)
        assert torch.equal(again, run_network(model, expert, batch))
    sizes = [sum(file.stat().st_size for file in files_in(tmp_path / name)) for name in ("whole", "small")]
    assert sizes[1] < 0.6 * sizes[0]


def test_the_same_seed_gives_the_same_folder_and_leaves_torchs_generator_alone(dit, tmp_path):
    state = torch.random.get_rng_state()
    for name in ("a", "b"):
        part = replace(SMALL, refine=2, grid=2)
        quantize_svdquant(dit, digits(), part, Workspace.at(tmp_path / "work")).expert.save(tmp_path / name)
    assert torch.equal(torch.random.get_rng_state(), state)
    contents = [
        {str(file.relative_to(tmp_path / name)): checksum(file) for file in files_in(tmp_path / name)} for name in "ab"
    ]
    assert contents[0] == contents[1]


def test_a_network_without_such_layers_is_an_error(dit, tmp_path):
    with pytest.raises(StageError, match=r"svdquant found no linear layer .* in expert 0"):
        quantize_svdquant(replace(dit, model=nn.Conv2d(1, 1, 3)), digits(), SMALL, Workspace.at(tmp_path))


def test_it_stops_when_it_is_asked_to(dit, tmp_path):
    with pytest.raises(Preempted, match="stopped after 0 of 12 layers"):
        quantize_svdquant(dit, digits(), SMALL, replace(Workspace.at(tmp_path), stopping=lambda: True))
