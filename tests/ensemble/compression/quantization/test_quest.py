"""QuEST: time-wise grids, and what training the layers that are told the time is worth."""

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
from experts.compressed.quantization.fake_quant import best_grids, fake_quantize_at
from experts.config import TrainingConfig
from experts.expert import Expert
from tests.ensemble.compression.trained import digits, trained

TUNING = TrainingConfig(steps=60, batch_size=32, lr=1e-3, warmup_steps=5, checkpoint_every=20)
BRIEF = replace(TUNING, steps=3)
SMALL = QuESTConfig(times=8, rows=32, entries=1024, time_embedding=TUNING, sensitive=TUNING, min_elements=256)


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    return trained("dit", Workspace.at(tmp_path_factory.mktemp("dit")))


def errors_of(outcome):
    return outcome.details["output_errors"]


def calibrated(**given):
    return replace(SMALL, time_embedding=None, sensitive=None, **given)


def test_every_time_has_a_grid_of_its_own_or_all_share_one(dit, tmp_path):
    for timewise, count in ((True, 8), (False, 1)):
        outcome = quantize_quest(dit, digits(), calibrated(timewise=timewise), Workspace.at(tmp_path))
        forms = [form for form in outcome.expert.model.modules() if isinstance(form, TimestepActivationQuantizer)]
        assert len(forms) == len(outcome.details["layers"]) and {len(form.steps) for form in forms} == {count}
        assert all(len(form.steps.unique()) == count for form in forms[-4:])
        assert timewise is False or torch.equal(forms[0].times, 1000 * (torch.arange(8) + 0.5) / 8)
        assert errors_of(outcome)["calibrated"] < 0.3


def test_for_inputs_that_grow_with_the_time_grids_of_their_own_are_better():
    samples = torch.randn(8, 500, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.2, 3, 8)[:, None]

    def error(grouped):
        steps, zeros = best_grids(grouped, 4)
        return (fake_quantize_at(grouped, steps[:, None], zeros[:, None], 4) - grouped).square().sum()

    assert error(samples) < 0.8 * error(samples.reshape(1, -1))


@pytest.mark.slow
def test_training_the_layers_that_are_told_the_time_lowers_the_error_and_the_sensitive_ones_lower_it_more(
    dit, tmp_path
):
    whole = quantize_quest(dit, digits(), replace(SMALL, trained_share=1.0), Workspace.at(tmp_path / "whole"))
    assert errors_of(whole)["time_embedding"] < errors_of(whole)["calibrated"]
    assert errors_of(whole)["sensitive"] <= 0.75 * errors_of(whole)["calibrated"]
    few = quantize_quest(dit, digits(), SMALL, Workspace.at(tmp_path / "few"))
    assert few.details["trained_share"] <= 0.2 < whole.details["trained_share"]
    assert errors_of(few)["sensitive"] <= 0.85 * errors_of(few)["calibrated"]
    assert set(few.details["trained_layers"]) < set(whole.details["trained_layers"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mlp", "unet", "dit"])
def test_the_folder_gives_the_same_bits_and_what_is_said_of_it_is_so(kind, dit, tmp_path):
    expert = dit if kind == "dit" else trained(kind, Workspace.at(tmp_path / "train"), 20)
    before = {name: value.clone() for name, value in expert.model.state_dict().items()}
    config = replace(SMALL, time_embedding=BRIEF, sensitive=BRIEF, sensitive_convolutions=True)
    outcome = quantize_quest(expert, digits(), config, Workspace.at(tmp_path / "work"))
    assert all(torch.equal(value, before[name]) for name, value in expert.model.state_dict().items())
    assert not list(expert.model._forward_pre_hooks) and 0 < outcome.details["trained_share"] < 1
    outcome.expert.save(tmp_path / "small")
    loaded = Expert.load(tmp_path / "small")
    batch = calibration_batches(digits(), 8, 1, 1)[0]
    with torch.no_grad():
        assert torch.equal(run_network(loaded.model, expert, batch), run_network(outcome.expert.model, expert, batch))
    assert outcome.modules == len(outcome.details["layers"]) + outcome.details["weights_stored_in_few_bits"]
    assert all(parameter.requires_grad for parameter in outcome.expert.model.parameters())


@pytest.mark.slow
def test_only_the_layers_that_are_named_change(dit, tmp_path):
    plain = quantize_quest(dit, digits(), calibrated(), Workspace.at(tmp_path / "a")).expert.model.state_dict()
    config = replace(SMALL, time_embedding=BRIEF, sensitive=None, trained_share=1.0, vectors=False)
    outcome = quantize_quest(dit, digits(), config, Workspace.at(tmp_path / "b"))
    named = outcome.details["trained_layers"]
    assert named == sorted(quantizable_layers(dit.model, "time_embedding"))
    for name, value in outcome.expert.model.state_dict().items():
        is_named = any(name.startswith(f"{path}.") for path in named)
        if not is_named:
            assert torch.equal(value, plain[name]), name
        elif name.endswith(".steps"):
            assert not torch.equal(value, plain[name]), name


@pytest.mark.slow
def test_with_vectors_the_codes_of_other_layers_stay_and_their_scales_do_not(dit, tmp_path):
    plain = quantize_quest(dit, digits(), calibrated(), Workspace.at(tmp_path / "a")).expert.model.state_dict()
    outcome = quantize_quest(
        dit, digits(), replace(SMALL, time_embedding=BRIEF, sensitive=None), Workspace.at(tmp_path / "b")
    )
    named = outcome.details["trained_layers"]
    others = [path for path in outcome.details["layers"] if path not in named]
    for path in others:
        scales = outcome.expert.model.state_dict()[f"{path}.parametrizations.weight.0.scales"]
        assert not torch.equal(scales, plain[f"{path}.parametrizations.weight.0.scales"])
        assert ((scales / plain[f"{path}.parametrizations.weight.0.scales"]).log().abs() < 0.2).all()
    assert others and named


@pytest.mark.slow
def test_stopped_in_a_training_and_started_again_it_gives_the_same_bits(dit, tmp_path):
    config = replace(SMALL, sensitive=replace(TUNING, steps=6), time_embedding=replace(TUNING, steps=6))
    whole = quantize_quest(dit, digits(), config, Workspace.at(tmp_path / "whole")).expert.model.state_dict()
    asked = 0

    def stopping():
        nonlocal asked
        asked += 1
        return asked == config.times + 6 + 3

    with pytest.raises(Preempted, match="stopped at step"):
        quantize_quest(dit, digits(), config, replace(Workspace.at(tmp_path / "halves"), stopping=stopping))
    again = quantize_quest(dit, digits(), config, Workspace.at(tmp_path / "halves")).expert.model.state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in again.items())


def test_a_network_without_such_layers_is_an_error(dit, tmp_path):
    with pytest.raises(StageError, match="quest found no layer to round in expert 0"):
        quantize_quest(replace(dit, model=nn.Conv2d(1, 1, 3)), digits(), SMALL, Workspace.at(tmp_path))
