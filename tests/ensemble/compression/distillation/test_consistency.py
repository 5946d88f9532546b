"""Consistency students: their losses, their discretisation, the coupling, and what comes of it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ddm_core.artifacts import Workspace
from ensemble.compression.distillation.config import ConsistencyConfig
from ensemble.compression.distillation.consistency import (
    LOSSES,
    consistency_losses,
    fix_scales,
    intervals,
    optimal_coupling,
    threshold,
    train_consistency,
)
from experts.config import TrainingConfig
from tests.ensemble.compression.distillation.test_sid import distance, drawn
from tests.ensemble.compression.trained import digits, trained

TRAINING = TrainingConfig(steps=400, batch_size=64, lr=1e-3, warmup_steps=10, checkpoint_every=100)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return trained("mlp", Workspace.at(tmp_path_factory.mktemp("mlp")), 1500)


@given(st.floats(0, 50), st.floats(0.01, 2))
def test_losses_are_their_equations_and_outliers_count_least_with_cauchy(distance, c):
    squared = torch.tensor([distance**2])
    found = {name: float(loss(squared, c)) for name, loss in LOSSES.items()}
    assert found["cauchy"] == pytest.approx(float(torch.log1p(squared / (2 * c**2))), rel=1e-4, abs=1e-6)
    assert found["pseudo_huber"] == pytest.approx((distance**2 + c**2) ** 0.5 - c, rel=1e-3, abs=1e-4)
    assert found["l2"] == pytest.approx(distance**2, rel=1e-4, abs=1e-6)


def test_slopes_fall_behind_an_outlier_with_cauchy_and_not_with_the_others():
    slopes = {}
    for name, loss in LOSSES.items():
        squared = torch.tensor([1.0, 100.0], requires_grad=True)
        loss(squared, 0.1).sum().backward()
        slopes[name] = float(squared.grad[1] * 10 / squared.grad[0])  # by the distance, not by its square
    assert slopes["cauchy"] < 0.2 and slopes["pseudo_huber"] == pytest.approx(1, abs=0.01) and slopes["l2"] == 10


def test_the_discretisation_doubles_until_it_is_the_finest():
    config = ConsistencyConfig(coarsest_intervals=10, finest_intervals=100, training=replace(TRAINING, steps=1000))
    counts = [intervals(step, config) for step in range(1000)]
    assert counts[0] == 10 and counts[-1] == 100 and counts == sorted(counts)
    assert sorted(set(counts)) == [10, 20, 40, 80, 100]
    lengths = [counts.count(count) for count in (10, 20, 40, 80, 100)]
    assert max(lengths) - min(lengths) <= 1


def test_c_follows_the_discretisation_if_it_is_to():
    adaptive, fixed = (
        ConsistencyConfig(coarsest_intervals=10),
        ConsistencyConfig(coarsest_intervals=10, adaptive_c=False),
    )
    assert threshold(adaptive, 40, 64) == pytest.approx(threshold(adaptive, 10, 64) / 4)
    assert threshold(fixed, 40, 64) == threshold(fixed, 10, 64) == threshold(adaptive, 10, 64)


def test_the_diffusion_loss_counts_at_early_t_alone():
    said, clean = torch.ones(2, 3), torch.zeros(2, 3)
    config = ConsistencyConfig(early=0.3)
    early = consistency_losses(said, said, clean, torch.tensor([0.2, 0.9]), 10, config)
    late = consistency_losses(said, said, clean, torch.tensor([0.8, 0.9]), 10, config)
    assert float(early["diffusion"]) == pytest.approx(0.5) and float(late["diffusion"]) == 0
    assert float(early["loss"]) == pytest.approx(0.1 * 0.5) and float(late["loss"]) == 0


@given(st.integers(0, 1000), st.integers(2, 12))
def test_coupled_noise_is_the_same_noise_nearer_to_its_samples_and_stays_within_its_class(seed, rows):
    generator = torch.Generator().manual_seed(seed)
    clean, noise = (torch.randn(rows, 4, generator=generator) for _ in range(2))
    group = torch.randint(2, (rows,), generator=generator)
    found = optimal_coupling(clean, noise, group)
    assert (found - clean).square().sum() <= (noise - clean).square().sum() + 1e-4
    for value in (0, 1):
        ours, theirs = found[group == value], noise[group == value]
        assert sorted(map(tuple, ours.tolist())) == sorted(map(tuple, theirs.tolist()))


def test_scales_of_layer_norms_stay_and_their_shifts_do_not(tmp_path):
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    assert fix_scales(network) == 1
    assert not network[1].weight.requires_grad and network[1].bias.requires_grad


def test_a_finest_discretisation_below_the_coarsest_is_refused():
    with pytest.raises(ValidationError, match="raise finest"):
        ConsistencyConfig(coarsest_intervals=20, finest_intervals=10)


@pytest.mark.slow
@pytest.mark.parametrize("teacher_leads", [False, True])
def test_one_step_is_nearer_to_the_data_than_one_plain_step(teacher_leads, teacher, tmp_path):
    config = ConsistencyConfig(steps=1, training=TRAINING, finest_intervals=40, teacher=teacher_leads)
    outcome = train_consistency(teacher, digits(), config, Workspace.at(tmp_path))
    assert distance(drawn(outcome.network)) < 0.6 * distance(drawn(teacher))
    assert outcome.network.few_step.step_types == ("renoise",) and outcome.network.few_step.is_distilled
