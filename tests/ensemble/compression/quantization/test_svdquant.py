"""SVDQuant: the benefit of each of its parts on outliers and on a trained transformer."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from ddm_core.artifacts import Preempted, Workspace, list_files
from ddm_core.files.checksums import checksum
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
    """Return a layer and two batches in which some inputs are forty times as large as the others."""
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


def test_all_parts_halve_the_error_of_either_with_outliers():
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


def test_reported_errors_are_true_and_refinement_lowers_them():
    linear, x, _ = outliers(64)
    result = search(linear, x, replace(SMALL, refine=50))
    assert error(linear, result.layer, x) == pytest.approx(result.errors[-1], rel=1e-3)
    assert len(result.errors) > 1 and list(result.errors) == sorted(result.errors, reverse=True)


@pytest.mark.parametrize("has_bias", [True, False])
def test_slightly_negative_inputs_are_shifted_and_unsigned(has_bias):
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(64, 32, bias=has_bias)
    x = nn.functional.gelu(3 * torch.randn(300, 64, generator=generator))
    layer = search(linear, x, replace(SMALL, bits=8, activation_bits=8)).layer
    assert layer.shape.is_unsigned and layer.shift.item() == pytest.approx(-x.amin().item())
    with torch.no_grad():
        assert ((layer(x) - linear(x)).norm() / linear(x).norm()).item() < 0.01
    assert not search(linear, x - 3, SMALL).layer.shape.is_unsigned


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (16, 16)])
def test_the_branch_is_the_truncated_svd(shape):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    up, down = low_rank(weight, 5)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(up @ down, (u[:, :5] * s[:5]) @ v[:5], rtol=1e-3, atol=1e-4)
    assert [factor.shape for factor in low_rank(weight, 0)] == [(shape[0], 0), (0, shape[1])]


@pytest.mark.integration
def test_every_part_lowers_the_error_of_a_transformer(dit, tmp_path):
    def output_error(part):
        result = quantize_svdquant(dit, digits(), replace(part, rest_bits=None), Workspace.at(tmp_path))
        return result.details["output_error"]

    errors = {name: output_error(part) for name, part in PARTS.items()}
    assert errors["all"] <= 0.6 * errors["naive"]
    assert errors["all"] <= 0.9 * min(errors["smooth"], errors["branch"])


@pytest.mark.slow
def test_time_embedding_layers_can_have_a_branch(dit, tmp_path):
    small = replace(SMALL, rest_bits=4, refine=2, grid=2, min_elements=256)
    plain, split = (
        quantize_svdquant(dit, digits(), replace(small, time_embedding=is_split), Workspace.at(tmp_path)).details
        for is_split in (False, True)
    )
    assert split["output_error_of_layers"] == plain["output_error_of_layers"]
    assert split["output_error"] < 1.1 * plain["output_error"]
    assert set(split["layers"]) - set(plain["layers"]) == set(quantizable_layers(dit.model, "time_embedding"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mlp", "unet", "dit"])
def test_a_saved_expert_loads_bit_identical(kind, dit, tmp_path):
    expert = dit if kind == "dit" else trained(kind, Workspace.at(tmp_path / "train"), 20)
    before = {name: value.clone() for name, value in expert.model.state_dict().items()}
    result = quantize_svdquant(expert, digits(), replace(SMALL, refine=2, grid=2), Workspace.at(tmp_path / "work"))
    assert all(torch.equal(value, before[name]) for name, value in expert.model.state_dict().items())
    model = result.expert.model
    replaced = [path for path, module in model.named_modules() if isinstance(module, SVDLinear)]
    assert replaced == quantizable_layers(expert.model, "attention", "feed_forward") and result.flops > 0
    assert result.modules == len(replaced) + result.details["weights_stored_in_few_bits"] > len(replaced)
    expert.save(tmp_path / "original")
    result.expert.save(tmp_path / "small")
    batch = calibration_batches(digits(), 8, 1, 1)[0]
    with torch.no_grad():
        loaded = run_network(Expert.load(tmp_path / "small").model, expert, batch)
        assert torch.equal(loaded, run_network(model, expert, batch))
    sizes = [sum(file.stat().st_size for file in list_files(tmp_path / name)) for name in ("original", "small")]
    assert sizes[1] < 0.6 * sizes[0]


def test_results_depend_only_on_the_seed(dit, tmp_path):
    state = torch.random.get_rng_state()
    for name in ("a", "b"):
        config = replace(SMALL, refine=2, grid=2)
        quantize_svdquant(dit, digits(), config, Workspace.at(tmp_path / "work")).expert.save(tmp_path / name)
    assert torch.equal(torch.random.get_rng_state(), state)
    contents = [
        {str(file.relative_to(tmp_path / name)): checksum(file) for file in list_files(tmp_path / name)}
        for name in "ab"
    ]
    assert contents[0] == contents[1]


def test_a_network_without_known_layers_is_an_error(dit, tmp_path):
    with pytest.raises(StageError, match=r"svdquant needs attention or feed-forward layers, and expert 0"):
        quantize_svdquant(replace(dit, model=nn.Conv2d(1, 1, 3)), digits(), SMALL, Workspace.at(tmp_path))


def test_a_stop_request_preempts_the_search(dit, tmp_path):
    with pytest.raises(Preempted, match="stopped after 0 of 12 layers"):
        quantize_svdquant(dit, digits(), SMALL, replace(Workspace.at(tmp_path), stopping=lambda: True))
