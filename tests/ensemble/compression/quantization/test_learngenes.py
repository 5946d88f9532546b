"""Learngenes: tailors and gates against differences of low rank, their training, and a folder that keeps them."""

from dataclasses import replace

import pytest
import torch

from ensemble.compression.method import StageError
from ensemble.compression.quantization.config import LearngenesConfig, SharedBaseConfig
from ensemble.compression.quantization.learngenes import fit_tailors, share_learngenes
from ensemble.compression.quantization.shared_base import share_base
from ensemble.pipeline import EnsemblePipeline
from experts.compressed.quantization.shared_weight import shared_weights
from experts.config import TrainingConfig
from experts.training.latent_dataset import LatentDataset
from tests.ensemble.compression.quantization.test_shared_base import (
    SHAPE,
    make_experts,
    make_pipeline,
    velocity,
    workspace,
)

__all__ = ["workspace"]

UNTRAINED = LearngenesConfig(bits=16, base_bits=16, training=None, rounds=20)
TRAINING = TrainingConfig(steps=12, batch_size=24, lr=1e-3, warmup_steps=2)


def latents(count=48, experts=3):
    index = torch.arange(count)
    return LatentDataset(clean=torch.randn(count, *SHAPE), class_id=index % 2, cluster_id=index % experts)


def total_bytes(result):
    return result.details["bytes_shared"] + result.details["bytes_own"]


def weight_error(result, name):
    return result.details["weights"][name]["error"]


def test_experts_share_tailors_by_their_gates():
    torch.manual_seed(0)
    base, delta, signs = torch.randn(24, 20), torch.randn(24, 6) @ torch.randn(6, 20), (1, 1, -1, -1)
    weights, config = torch.stack([base + sign * delta for sign in signs]), replace(UNTRAINED, rank=0.1, rounds=60)
    free, fixed = (fit_tailors(weights, replace(config, learn_gates=learn)) for learn in (True, False))
    assert len(free.left) == len(fixed.left) == 6
    errors = [
        max(float((tailors.weight(k).detach() - weight).norm() / delta.norm()) for k, weight in enumerate(weights))
        for tailors in (free, fixed)
    ]
    assert errors[0] < 1e-3 and errors[1] > 0.3


@pytest.mark.parametrize("kind", ["residual_mlp", "dit"])
def test_learned_gates_beat_fixed_ones_in_no_more_bytes(kind, workspace):
    experts = make_experts(kind, count=3, rank=4)
    low_rank = share_base(experts, SharedBaseConfig(delta="low_rank", bits=16, base_bits=16), workspace)
    free, fixed = (
        share_learngenes(experts, None, replace(UNTRAINED, learn_gates=learn), workspace) for learn in (True, False)
    )
    assert total_bytes(free) == total_bytes(fixed) <= total_bytes(low_rank)
    assert free.modules == 3 * len(free.details["weights"])
    errors = [sum(weight_error(result, name) for name in free.details["weights"]) for result in (free, fixed)]
    assert errors[0] < errors[1]


def test_training_lowers_the_error_of_outputs(workspace):
    experts, data = make_experts("dit", count=3, spread=0.5), latents()
    trained = share_learngenes(experts, data, replace(UNTRAINED, training=replace(TRAINING, steps=30)), workspace)
    before = share_learngenes(experts, data, UNTRAINED, workspace)
    errors = [
        sum(float((velocity(result.experts[k]) - velocity(experts[k])).norm()) for k in experts)
        for result in (before, trained)
    ]
    assert errors[1] < 0.95 * errors[0] and trained.flops > 0
    assert trained.details["error_trained"] < trained.details["error_fitted"]


def test_training_that_raises_the_error_is_dropped(workspace):
    experts = make_experts("residual_mlp", count=2)
    config = replace(UNTRAINED, training=replace(TRAINING, lr=0.05, steps=4), align_weight=0.0)
    wrong = share_learngenes(experts, latents(experts=2), config, workspace)
    assert wrong.details["error_trained"] > wrong.details["error_fitted"]
    for k, expert in share_learngenes(experts, None, UNTRAINED, workspace).experts.items():
        torch.testing.assert_close(velocity(wrong.experts[k]), velocity(expert), rtol=0.05, atol=0.01)


def test_alignment_without_blocks_is_refused(workspace):
    experts = make_experts("unet", count=2)
    config = replace(UNTRAINED, training=TRAINING)
    with pytest.raises(StageError, match=r"UNet2DModel has none of one width; set quantize\.align_weight=0"):
        share_learngenes(experts, latents(experts=2), config, workspace)
    assert share_learngenes(experts, latents(experts=2), replace(config, align_weight=0.0), workspace).modules


def test_saved_experts_equal_loaded_ones(workspace, tmp_path):
    experts = make_experts("residual_mlp", count=3)
    result = share_learngenes(experts, None, replace(UNTRAINED, bits=8, base_bits=4), workspace)
    make_pipeline(dict(result.experts)).save_pretrained(tmp_path / "pipeline")
    loaded = EnsemblePipeline.from_pretrained(tmp_path / "pipeline").ensemble.experts
    for k, expert in result.experts.items():
        assert torch.equal(velocity(loaded[k]), velocity(expert))
    bases = [{weight.base for _, weight in shared_weights(expert.model)} for expert in loaded.values()]
    assert bases[0] == bases[1] == bases[2]
