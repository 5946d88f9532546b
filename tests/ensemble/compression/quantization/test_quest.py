"""QuEST: activation grids per timestep, and the benefit of training the sensitive layers."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from ddm_core.artifacts import Preempted, Workspace
from ensemble.compression.common.calibration_data import calibration_batches, run_network
from ensemble.compression.method import StageError
from ensemble.compression.quantization.config import QuESTConfig
from ensemble.compression.quantization.layers import quantizable_layers
from ensemble.compression.quantization.quest import quantize_quest
from experts.compressed.quantization.activation_quant import TimestepActivationQuantizer
from experts.compressed.quantization.attention_quant import AttentionOperandQuantizer
from experts.compressed.quantization.fake_quant import fake_quantize_at, search_grids
from experts.config import TrainingConfig
from experts.expert import Expert
from tests.ensemble.compression.trained import digits, trained

TUNING = TrainingConfig(steps=60, batch_size=32, lr=1e-3, warmup_steps=5, checkpoint_every=20)
BRIEF = replace(TUNING, steps=3)
SMALL = QuESTConfig(times=8, rows=32, tokens=256, time_embedding=TUNING, sensitive=TUNING, min_elements=256)


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    return trained("dit", Workspace.at(tmp_path_factory.mktemp("dit")))


def output_errors(result):
    return result.details["output_errors"]


def without_training(**settings):
    return replace(SMALL, time_embedding=None, sensitive=None, **settings)


def test_each_time_has_its_own_grid_or_all_share_one(dit, tmp_path):
    for timewise, count in ((True, 8), (False, 1)):
        result = quantize_quest(dit, digits(), without_training(timewise=timewise), Workspace.at(tmp_path))
        modules = [*result.expert.model.modules()]
        quantizers = [module for module in modules if isinstance(module, TimestepActivationQuantizer)]
        operands = [module for module in modules if isinstance(module, AttentionOperandQuantizer)]
        assert len(quantizers) - len(operands) == len(result.details["layers"]) and len(operands) == 4 * 2
        assert {len(quantizer.steps) for quantizer in quantizers} == {count}
        assert {quantizer.steps.shape[1] for quantizer in quantizers} == {1, 64, 256}
        assert {quantizer.bits for quantizer in operands} == {4, 8} and not operands[-1].zeros.any()
        assert timewise is False or torch.equal(quantizers[0].times, 1000 * (torch.arange(8) + 0.5) / 8)
        assert output_errors(result)["calibrated"] < 0.3


def test_timewise_grids_fit_inputs_that_grow_with_time_better():
    samples = torch.randn(8, 500, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.2, 3, 8)[:, None]

    def error(grouped):
        steps, zeros = search_grids(grouped, 4)
        assert torch.equal(steps, steps.half().float())
        return (fake_quantize_at(grouped, steps[:, None], zeros[:, None], 4) - grouped).square().sum()

    assert error(samples) < 0.8 * error(samples.reshape(1, -1))


def test_rounding_and_a_grid_a_channel_lower_the_error(dit, tmp_path):
    result = quantize_quest(dit, digits(), without_training(), Workspace.at(tmp_path))
    errors = output_errors(result)
    assert errors["rounded"] < errors["calibrated"]
    other = quantize_quest(
        dit, digits(), without_training(channelwise=False, adaptive_rounding=False), Workspace.at(tmp_path)
    )
    assert errors["calibrated"] < output_errors(other)["calibrated"] and "rounded" not in output_errors(other)


@pytest.mark.integration
def test_training_sensitive_layers_lowers_the_error(dit, tmp_path):
    full = quantize_quest(dit, digits(), replace(SMALL, trained_share=1.0), Workspace.at(tmp_path / "full"))
    assert output_errors(full)["time_embedding"] < output_errors(full)["calibrated"]
    assert output_errors(full)["sensitive"] <= 0.75 * output_errors(full)["calibrated"]
    limited = quantize_quest(dit, digits(), SMALL, Workspace.at(tmp_path / "limited"))
    assert limited.details["trained_share"] <= 0.2 < full.details["trained_share"]
    assert output_errors(limited)["sensitive"] <= 0.85 * output_errors(limited)["calibrated"]
    assert set(limited.details["trained_layers"]) < set(full.details["trained_layers"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mlp", "unet", "dit"])
def test_a_saved_expert_loads_bit_identical(kind, dit, tmp_path):
    expert = dit if kind == "dit" else trained(kind, Workspace.at(tmp_path / "train"), 20)
    before = {name: value.clone() for name, value in expert.model.state_dict().items()}
    config = replace(SMALL, times=2, time_embedding=BRIEF, sensitive=BRIEF, sensitive_convolutions=True)
    result = quantize_quest(expert, digits(), config, Workspace.at(tmp_path / "work"))
    assert all(torch.equal(value, before[name]) for name, value in expert.model.state_dict().items())
    assert not list(expert.model._forward_pre_hooks) and 0 < result.details["trained_share"] < 1
    result.expert.save(tmp_path / "small")
    loaded = Expert.load(tmp_path / "small")
    batch = calibration_batches(digits(), 8, 1, 1)[0]
    with torch.no_grad():
        assert torch.equal(run_network(loaded.model, expert, batch), run_network(result.expert.model, expert, batch))
    assert result.modules == len(result.details["layers"]) + result.details["weights_stored_in_few_bits"]
    assert all(parameter.requires_grad for parameter in result.expert.model.parameters())


@pytest.mark.slow
def test_only_the_trained_layers_change(dit, tmp_path):
    plain = quantize_quest(dit, digits(), without_training(), Workspace.at(tmp_path / "a")).expert.model.state_dict()
    config = replace(SMALL, time_embedding=BRIEF, sensitive=None, trained_share=1.0, vectors=False)
    result = quantize_quest(dit, digits(), config, Workspace.at(tmp_path / "b"))
    trained_layers = result.details["trained_layers"]
    assert trained_layers == sorted(quantizable_layers(dit.model, "time_embedding"))
    for name, value in result.expert.model.state_dict().items():
        is_trained = any(name.startswith(f"{path}.") for path in trained_layers)
        if not is_trained:
            assert torch.equal(value, plain[name]), name
        elif name.endswith(".steps"):
            assert not torch.equal(value, plain[name]), name


@pytest.mark.slow
def test_with_vectors_scales_of_untrained_layers_change(dit, tmp_path):
    plain = quantize_quest(dit, digits(), without_training(), Workspace.at(tmp_path / "a")).expert.model.state_dict()
    result = quantize_quest(
        dit, digits(), replace(SMALL, time_embedding=BRIEF, sensitive=None), Workspace.at(tmp_path / "b")
    )
    trained_layers = result.details["trained_layers"]
    others = [path for path in result.details["layers"] if path not in trained_layers]
    for path in others:
        scales = result.expert.model.state_dict()[f"{path}.parametrizations.weight.0.scales"]
        assert not torch.equal(scales, plain[f"{path}.parametrizations.weight.0.scales"])
        assert ((scales / plain[f"{path}.parametrizations.weight.0.scales"]).log().abs() < 0.2).all()
    assert others and trained_layers


@pytest.mark.slow
def test_a_resumed_training_is_bit_identical(dit, tmp_path):
    config = replace(
        SMALL, sensitive=replace(TUNING, steps=6), time_embedding=replace(TUNING, steps=6), adaptive_rounding=False
    )
    uninterrupted = quantize_quest(dit, digits(), config, Workspace.at(tmp_path / "whole")).expert.model.state_dict()
    polls = 0

    def stopping():
        nonlocal polls
        polls += 1
        return polls == config.times + 6 + 3

    with pytest.raises(Preempted, match="stopped at step"):
        quantize_quest(dit, digits(), config, replace(Workspace.at(tmp_path / "halves"), stopping=stopping))
    resumed = quantize_quest(dit, digits(), config, Workspace.at(tmp_path / "halves")).expert.model.state_dict()
    assert all(torch.equal(value, uninterrupted[name]) for name, value in resumed.items())


def test_a_network_without_known_layers_is_an_error(dit, tmp_path):
    with pytest.raises(StageError, match="quest needs a layer .* and expert 0 has none"):
        quantize_quest(replace(dit, model=nn.Conv2d(1, 1, 3)), digits(), SMALL, Workspace.at(tmp_path))
