"""LAPTOP-Diff: removal of layers of a trained network, and recovery by fine-tuning."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.models.attention import JointTransformerBlock

from ddm_core.artifacts import Workspace
from ensemble.compression.common.network_stages import image_features
from ensemble.compression.method import StageError
from ensemble.compression.pruning.config import LaptopConfig
from ensemble.compression.pruning.feature_distillation import stages_behind
from ensemble.compression.pruning.laptop import measure_additivity, prune_laptop
from experts.compressed.pruning.layers import layer_sizes
from experts.config import TrainingConfig
from experts.training.flops import count_parameters
from tests.ensemble.compression.trained import digits, trained

RETRAINING = TrainingConfig(steps=30, batch_size=16, lr=1e-3, warmup_steps=2, log_every=10)


@pytest.fixture(scope="module", params=["dit", "unet"])
def original(request, tmp_path_factory):
    return trained(request.param, Workspace.at(tmp_path_factory.mktemp("trained"))), digits()


def run(original, folder, **settings):
    expert, dataset = original
    config = replace(LaptopConfig(ratio=0.25, rows=32, finetune=None), **settings)
    return prune_laptop(expert, dataset, config, Workspace.at(folder))


def test_pruning_beats_chance_and_fine_tuning_recovers(original, tmp_path):
    before = {name: value.clone() for name, value in original[0].model.state_dict().items()}
    pruned = run(original, tmp_path / "a", finetune=RETRAINING, additivity_sets=5)
    chance = [run(original, tmp_path / f"r{seed}", criterion="random", seed=seed) for seed in range(3)]
    assert pruned.details["share"] >= 0.25 and pruned.modules == len(pruned.details["removed"]) > 0 and pruned.flops > 0
    assert pruned.details["error_pruned"] < sum(result.details["error_pruned"] for result in chance) / len(chance)
    assert pruned.details["error_retrained"] < pruned.details["error_pruned"]
    assert -1 <= pruned.details["additivity"].spearman <= 1
    assert all(torch.equal(original[0].model.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("ratio", [0.2, 0.3, 0.5])
def test_no_set_of_less_loss_frees_as_much(original, ratio, tmp_path):
    model, details = original[0].model, run(original, tmp_path, ratio=ratio).details
    paths, losses = list(details["costs"]), np.array(list(details["costs"].values()))
    subsets = np.arange(2 ** len(paths))[:, None] >> np.arange(len(paths)) & 1 == 1
    freed = np.zeros(len(subsets), int)
    for layers, size in layer_sizes(model).items():
        freed += size * subsets[:, [paths.index(path) for path in layers]].all(1)
    chosen = np.array([path in details["removed"] for path in paths])
    assert details["share"] * count_parameters(model) == pytest.approx(freed[(subsets == chosen).all(1)][0])
    least = (subsets[freed >= round(ratio * count_parameters(model))] @ losses).min()
    assert chosen @ losses == pytest.approx(least)


def test_a_ratio_above_the_removable_share_is_an_error(original, tmp_path):
    with pytest.raises(StageError, match=r"lower prune\.ratio"):
        run(original, tmp_path, ratio=0.99)


def test_only_stages_behind_the_first_removed_are_compared(original):
    model = original[0].model
    if not hasattr(model, "transformer_blocks"):
        assert stages_behind(model, ["mid_block.resnets.0"])[0] == "mid_block"
        return
    blocks = [f"transformer_blocks.{number}" for number in range(len(model.transformer_blocks))]
    assert stages_behind(model, [f"{blocks[-1]}.ff"]) == blocks[-1:]
    assert stages_behind(model, [f"{blocks[-1]}.ff", f"{blocks[0]}.attn1"]) == blocks


def test_additive_costs_have_rank_correlation_one():
    costs = [1.0, 3.0, 7.0, 20.0, 50.0]
    exact = measure_additivity(costs, lambda chosen: sum(costs[index] for index in chosen), 20, 0)
    assert exact.spearman == pytest.approx(1) and exact.ratio == pytest.approx(1)
    contrary = measure_additivity(costs, lambda chosen: 1 / sum(costs[index] for index in chosen), 20, 0)
    assert contrary.spearman < -0.9


@pytest.mark.parametrize("is_last", [False, True])
def test_features_of_a_joint_block_are_those_of_its_images(is_last):
    """The last block returns no text, so the first output is nothing to distil from."""
    torch.manual_seed(0)
    block = JointTransformerBlock(dim=8, num_attention_heads=2, attention_head_dim=4, context_pre_only=is_last)
    texts = torch.ones(1, 3, 8)
    text, image = block(hidden_states=torch.ones(1, 4, 8), encoder_hidden_states=texts, temb=torch.ones(1, 8))
    assert (text is None) == is_last and image_features(block, (text, image)) is image
    assert image_features(torch.nn.Identity(), image) is image
    assert image_features(torch.nn.Identity(), (image, (image,))) is image
