"""The unbiased MMD, and chains that are trained by it."""

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


def test_it_is_the_estimate_of_its_definition():
    x, y = rows(4, 0), rows(5, 1)
    kernel = median_kernel("poly3", y)

    def k(a, b):
        return float((a @ b / 3 + 1) ** 3)

    same = [sum(k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j) for s in (x, y)]
    cross = sum(k(a, b) for a in x for b in y)
    expected = same[0] / 12 + same[1] / 20 - 2 * cross / 20
    assert float(squared_mmd(x, y, kernel)) == pytest.approx(expected, rel=1e-4)


def test_it_is_zero_in_the_mean_for_one_distribution_and_not_for_two():
    kernel = median_kernel("rbf", rows(200, 9))

    def mean_of(shift):
        found = [squared_mmd(rows(100, seed, shift), rows(100, 1000 + seed), kernel) for seed in range(30)]
        return float(torch.stack(found).mean())

    assert abs(mean_of(0.0)) < 0.002 < 0.02 < mean_of(0.5)


def test_shared_conditions_do_not_bias_it():
    """Sets that are alike within every condition, which lie far apart."""
    kernel, conditions = median_kernel("rbf", rows(200, 9)), torch.arange(40) % 4
    place = torch.tensor([[-3.0], [0.0], [3.0], [6.0]])[conditions]
    found = [
        squared_mmd(rows(40, seed) + place, rows(40, 500 + seed) + place, kernel, (conditions, conditions), 0.2)
        for seed in range(60)
    ]
    assert abs(float(torch.stack(found).mean())) < 0.003


def test_gradients_are_finite_where_rows_are_equal():
    x = rows(6, 0).requires_grad_(True)
    squared_mmd(x, x.detach(), median_kernel("rbf", rows(20, 1))).backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_pairs_of_unlike_conditions_count_less_and_at_one_alike():
    x, y = rows(6, 0), rows(6, 1)
    kernel, conditions = median_kernel("rbf", y), (torch.arange(6) % 2, torch.arange(6) % 2)
    alike = squared_mmd(x, y, kernel, conditions)
    assert torch.equal(squared_mmd(x, y, kernel, (torch.zeros(6).long(),) * 2, 0.3), alike)
    assert not torch.equal(squared_mmd(x, y, kernel, conditions, 0.0), alike)


def test_one_row_is_too_few():
    with pytest.raises(StageError, match="two rows in each set"):
        squared_mmd(rows(1, 0), rows(4, 1), median_kernel("poly3", rows(4, 1)))


def test_random_filters_are_functions_of_a_seed_and_want_pictures(tmp_path):
    picture, expert = torch.randn(2, 1, 8, 8), trained("mlp", Workspace.at(tmp_path), 2)
    first, again, other = (latent_features("random_conv", expert, seed)(picture) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    with pytest.raises(StageError, match="take latents"):
        latent_features("random_conv", replace(expert, latent_shape=(10,)), 0)


@pytest.mark.parametrize("kind", ["mlp", "unet", "dit"])
def test_the_experts_middle_tells_latents_apart_and_has_gradients(kind, tmp_path):
    expert = trained(kind, Workspace.at(tmp_path), 2)
    features, latents = latent_features("expert", expert, 0), digits().clean[:3].clone().requires_grad_(True)
    found = features(latents)
    assert found.shape[0] == 3 and torch.cdist(found, found).sum() > 0
    found.square().sum().backward()
    assert (latents.grad.flatten(1).abs().sum(1) > 0).all()
    assert all(parameter.grad is None for parameter in expert.model.parameters())


@pytest.mark.slow
def test_a_short_chain_comes_nearer_to_the_data_on_noise_that_trained_nothing(tmp_path):
    expert = trained("mlp", Workspace.at(tmp_path / "t"), 1500)
    before = {name: value.clone() for name, value in expert.model.state_dict().items()}
    outcome = finetune_mmd(expert, digits(), MMDConfig(steps=2, training=TRAINING), Workspace.at(tmp_path / "w"))
    assert outcome.details["squared_mmd_after"] < 0.7 * outcome.details["squared_mmd_before"]
    assert outcome.network.few_step.times == (1.0, 0.5) and outcome.network.few_step.is_distilled
    assert all(torch.equal(value, before[name]) for name, value in expert.model.state_dict().items())


def test_a_curved_path_is_refused(tmp_path):
    expert = replace(trained("mlp", Workspace.at(tmp_path / "t"), 2), noise_schedule=NOISE_SCHEDULES["cosine"])
    with pytest.raises(StageError, match="step_type=euler takes straight steps"):
        finetune_mmd(expert, digits(), MMDConfig(training=TRAINING), Workspace.at(tmp_path / "w"))
