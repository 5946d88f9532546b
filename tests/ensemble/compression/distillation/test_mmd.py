"""The unbiased MMD, and few-step samplers trained with it."""

from dataclasses import replace

import pytest
import torch

from ddm_core.artifacts import Workspace
from ensemble.compression.distillation.config import MMDConfig
from ensemble.compression.distillation.mmd import finetune_mmd, median_kernel, squared_mmd
from ensemble.compression.distillation.mmd_features import latent_features
from ensemble.compression.method import StageError
from experts.config import TrainingConfig
from experts.diffusion.noise_schedule import NOISE_SCHEDULES
from tests.ensemble.compression.trained import digits, trained

TRAINING = TrainingConfig(steps=100, batch_size=128, lr=1e-3, warmup_steps=2, clip_norm=0.5, checkpoint_every=10)


def rows(count, seed, shift=0.0):
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)) + shift


def test_the_estimate_equals_its_definition():
    x, y = rows(4, 0), rows(5, 1)
    kernel = median_kernel("poly3", y)

    def k(a, b):
        return float((a @ b / 3 + 1) ** 3)

    same = [sum(k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j) for s in (x, y)]
    cross = sum(k(a, b) for a in x for b in y)
    expected = same[0] / 12 + same[1] / 20 - 2 * cross / 20
    assert float(squared_mmd(x, y, kernel)) == pytest.approx(expected, rel=1e-4)


def test_the_mean_is_zero_only_for_equal_distributions():
    kernel = median_kernel("rbf", rows(200, 9))

    def mean_estimate(shift):
        estimates = [squared_mmd(rows(100, seed, shift), rows(100, 1000 + seed), kernel) for seed in range(30)]
        return float(torch.stack(estimates).mean())

    assert abs(mean_estimate(0.0)) < 0.002 < 0.02 < mean_estimate(0.5)


def test_shared_conditions_do_not_bias_the_estimate():
    """Compare sets that are equal within every condition, with distant conditions."""
    kernel, conditions = median_kernel("rbf", rows(200, 9)), torch.arange(40) % 4
    centers = torch.tensor([[-3.0], [0.0], [3.0], [6.0]])[conditions]
    estimates = [
        squared_mmd(rows(40, seed) + centers, rows(40, 500 + seed) + centers, kernel, (conditions, conditions), 0.2)
        for seed in range(60)
    ]
    assert abs(float(torch.stack(estimates).mean())) < 0.003


def test_gradients_are_finite_for_equal_rows():
    x = rows(6, 0).requires_grad_(True)
    squared_mmd(x, x.detach(), median_kernel("rbf", rows(20, 1))).backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_pairs_of_different_conditions_have_less_weight():
    x, y = rows(6, 0), rows(6, 1)
    kernel, conditions = median_kernel("rbf", y), (torch.arange(6) % 2, torch.arange(6) % 2)
    unweighted = squared_mmd(x, y, kernel, conditions)
    assert torch.equal(squared_mmd(x, y, kernel, (torch.zeros(6).long(),) * 2, 0.3), unweighted)
    assert not torch.equal(squared_mmd(x, y, kernel, conditions, 0.0), unweighted)


def test_a_single_row_is_an_error():
    with pytest.raises(StageError, match="two rows in each set"):
        squared_mmd(rows(1, 0), rows(4, 1), median_kernel("poly3", rows(4, 1)))


def test_random_filters_depend_on_the_seed_and_need_images(tmp_path):
    image, expert = torch.randn(2, 1, 8, 8), trained("mlp", Workspace.at(tmp_path), 2)
    first, repeated, other = (latent_features("random_conv", expert, seed)(image) for seed in (0, 0, 1))
    assert torch.equal(first, repeated) and not torch.equal(first, other)
    with pytest.raises(StageError, match=r"set distill\.features=latents"):
        latent_features("random_conv", replace(expert, latent_shape=(10,)), 0)


@pytest.mark.parametrize("kind", ["mlp", "unet", "dit"])
def test_expert_features_differ_and_have_gradients(kind, tmp_path):
    expert = trained(kind, Workspace.at(tmp_path), 2)
    features, latents = latent_features("expert", expert, 0), digits().clean[:3].clone().requires_grad_(True)
    outputs = features(latents)
    assert outputs.shape[0] == 3 and torch.cdist(outputs, outputs).sum() > 0
    outputs.square().sum().backward()
    assert (latents.grad.flatten(1).abs().sum(1) > 0).all()
    assert all(parameter.grad is None for parameter in expert.model.parameters())


@pytest.mark.integration
def test_training_lowers_the_mmd_on_held_out_noise(tmp_path):
    expert = trained("mlp", Workspace.at(tmp_path / "t"), 1500)
    before = {name: value.clone() for name, value in expert.model.state_dict().items()}
    result = finetune_mmd(expert, digits(), MMDConfig(steps=2, training=TRAINING), Workspace.at(tmp_path / "w"))
    assert result.details["squared_mmd_after"] < 0.7 * result.details["squared_mmd_before"]
    assert result.network.few_step.times == (1.0, 0.5) and result.network.few_step.is_distilled
    assert all(torch.equal(value, before[name]) for name, value in expert.model.state_dict().items())


def test_a_curved_noise_schedule_is_an_error(tmp_path):
    expert = replace(trained("mlp", Workspace.at(tmp_path / "t"), 2), noise_schedule=NOISE_SCHEDULES["cosine"])
    with pytest.raises(StageError, match="step_type=euler takes straight steps"):
        finetune_mmd(expert, digits(), MMDConfig(training=TRAINING), Workspace.at(tmp_path / "w"))
