"""Layers that are taken out of a trained network, and what distillation brings back."""

from dataclasses import replace

import pytest
import torch

from ddm_core.artifacts import Workspace
from ensemble.compression.method import StageError
from ensemble.compression.pruning.config import LaptopConfig
from ensemble.compression.pruning.feature_distillation import stages_behind
from ensemble.compression.pruning.laptop import additivity, prune_laptop
from experts.config import TrainingConfig
from tests.ensemble.compression.trained import digits, trained

RETRAINING = TrainingConfig(steps=30, batch_size=16, lr=1e-3, warmup_steps=2, log_every=10)


@pytest.fixture(scope="module", params=["dit", "unet"])
def whole(request, tmp_path_factory):
    return trained(request.param, Workspace.at(tmp_path_factory.mktemp("trained"))), digits()


def run(whole, folder, **given):
    expert, dataset = whole
    config = replace(LaptopConfig(ratio=0.25, rows=32, finetune=None), **given)
    return prune_laptop(expert, dataset, config, Workspace.at(folder))


def test_enough_goes_and_less_is_lost_than_by_chance_and_training_brings_some_back(whole, tmp_path):
    before = {name: value.clone() for name, value in whole[0].model.state_dict().items()}
    ours = run(whole, tmp_path / "a", finetune=RETRAINING, additivity_sets=5)
    chance = [run(whole, tmp_path / f"r{seed}", criterion="random", seed=seed) for seed in range(3)]
    assert ours.details["share"] >= 0.25 and ours.modules == len(ours.details["removed"]) > 0 and ours.flops > 0
    assert ours.details["error_pruned"] < sum(one.details["error_pruned"] for one in chance) / len(chance)
    assert ours.details["error_retrained"] < ours.details["error_pruned"]
    assert -1 <= ours.details["additivity"].spearman <= 1
    assert all(torch.equal(whole[0].model.state_dict()[name], value) for name, value in before.items())


def test_more_than_there_is_is_refused(whole, tmp_path):
    with pytest.raises(StageError, match=r"lower prune\.ratio"):
        run(whole, tmp_path, ratio=0.99)


def test_only_stages_behind_the_first_removed_layer_are_compared(whole):
    model = whole[0].model
    if not hasattr(model, "transformer_blocks"):
        assert stages_behind(model, ["mid_block.resnets.0"])[0] == "mid_block"
        return
    blocks = [f"transformer_blocks.{number}" for number in range(len(model.transformer_blocks))]
    assert stages_behind(model, [f"{blocks[-1]}.ff"]) == blocks[-1:]
    assert stages_behind(model, [f"{blocks[-1]}.ff", f"{blocks[0]}.attn1"]) == blocks


def test_costs_that_add_up_rank_alike():
    costs = [1.0, 3.0, 7.0, 20.0, 50.0]
    exact = additivity(costs, lambda chosen: sum(costs[index] for index in chosen), 20, 0)
    assert exact.spearman == pytest.approx(1) and exact.ratio == pytest.approx(1)
    contrary = additivity(costs, lambda chosen: 1 / sum(costs[index] for index in chosen), 20, 0)
    assert contrary.spearman < -0.9
