"""Consistency students: losses, discretization, coupling, and the quality of samples."""

from dataclasses import replace

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from benchmarks.arms.paper_networks import ring_of_gaussians, squared_mmd_of
from ddm_core.artifacts import Workspace
from ensemble.compression.distillation.config import ConsistencyConfig
from ensemble.compression.distillation.consistency import (
    LOSSES,
    consistency_losses,
    freeze_scales,
    interval_count,
    loss_threshold,
    optimal_coupling,
    train_consistency,
)
from ensemble.compression.method import StageError
from experts.config import DiTConfig, TrainingConfig, UNetConfig
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from experts.networks.registry import build_network
from tests.ensemble.compression.distillation.test_sid import distance, generate
from tests.ensemble.compression.trained import digits, trained

TRAINING = TrainingConfig(steps=400, batch_size=64, lr=1e-3, warmup_steps=10, checkpoint_every=100)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return trained("mlp", Workspace.at(tmp_path_factory.mktemp("mlp")), 1500)


@given(st.floats(0, 50), st.floats(0.01, 2))
def test_losses_equal_their_equations(distance, c):
    squared = torch.tensor([distance**2])
    losses = {name: float(loss(squared, c)) for name, loss in LOSSES.items()}
    assert losses["cauchy"] == pytest.approx(float(torch.log1p(squared / (2 * c**2))), rel=1e-4, abs=1e-6)
    assert losses["pseudo_huber"] == pytest.approx((distance**2 + c**2) ** 0.5 - c, rel=1e-3, abs=1e-4)
    assert losses["l2"] == pytest.approx(distance**2, rel=1e-4, abs=1e-6)


def test_only_cauchy_lowers_the_gradient_of_outliers():
    slopes = {}
    for name, loss in LOSSES.items():
        squared = torch.tensor([1.0, 100.0], requires_grad=True)
        loss(squared, 0.1).sum().backward()
        slopes[name] = float(squared.grad[1] * 10 / squared.grad[0])  # by the distance, not by its square
    assert slopes["cauchy"] < 0.2 and slopes["pseudo_huber"] == pytest.approx(1, abs=0.01) and slopes["l2"] == 10


def test_intervals_double_up_to_the_finest():
    config = ConsistencyConfig(coarsest_intervals=10, finest_intervals=100, training=replace(TRAINING, steps=1000))
    counts = [interval_count(step, config) for step in range(1000)]
    assert counts[0] == 10 and counts[-1] == 100 and counts == sorted(counts)
    assert sorted(set(counts)) == [10, 20, 40, 80, 100]
    lengths = [counts.count(count) for count in (10, 20, 40, 80, 100)]
    assert max(lengths) - min(lengths) <= 1


def test_adaptive_c_follows_the_discretization():
    adaptive, fixed = (
        ConsistencyConfig(coarsest_intervals=10),
        ConsistencyConfig(coarsest_intervals=10, adaptive_c=False),
    )
    assert loss_threshold(adaptive, 40, 64) == pytest.approx(loss_threshold(adaptive, 10, 64) / 4)
    assert loss_threshold(fixed, 40, 64) == loss_threshold(fixed, 10, 64) == loss_threshold(adaptive, 10, 64)


def test_the_diffusion_loss_applies_only_at_small_t():
    predicted, clean = torch.ones(2, 3), torch.zeros(2, 3)
    config = ConsistencyConfig(early=0.3)
    early = consistency_losses(predicted, predicted, clean, torch.tensor([0.2, 0.9]), 10, config)
    late = consistency_losses(predicted, predicted, clean, torch.tensor([0.8, 0.9]), 10, config)
    assert float(early["diffusion"]) == pytest.approx(0.5) and float(late["diffusion"]) == 0
    assert float(early["loss"]) == pytest.approx(0.1 * 0.5) and float(late["loss"]) == 0


@given(st.integers(0, 1000), st.integers(2, 12))
def test_coupling_permutes_noise_within_classes(seed, rows):
    generator = torch.Generator().manual_seed(seed)
    clean, noise = (torch.randn(rows, 4, generator=generator) for _ in range(2))
    group = torch.randint(2, (rows,), generator=generator)
    coupled = optimal_coupling(clean, noise, group)
    assert (coupled - clean).square().sum() <= (noise - clean).square().sum() + 1e-4
    for value in (0, 1):
        permuted, original = coupled[group == value], noise[group == value]
        assert sorted(map(tuple, permuted.tolist())) == sorted(map(tuple, original.tolist()))


def test_only_scales_of_layer_norms_are_frozen(tmp_path):
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    assert freeze_scales(network) == 1
    assert not network[1].weight.requires_grad and network[1].bias.requires_grad
    assert freeze_scales(torch.nn.GroupNorm(1, 4)) == 1
    assert freeze_scales(torch.nn.RMSNorm(4)) == freeze_scales(RMSNorm(4, 1e-6)) == 1
    assert freeze_scales(torch.nn.LayerNorm(2, elementwise_affine=False)) == 0


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_fixed_scales_freeze_what_there_is_or_fail(kind, tmp_path):
    network, training = {"unet": UNetConfig(channels=(8, 8)), "dit": DiTConfig(depth=1)}[kind], TrainingConfig(steps=1)
    expert = Expert(
        model=build_network(network, (1, 8, 8), 10),
        prediction="velocity",
        noise_schedule=RECTIFIED_FLOW,
        latent_shape=(1, 8, 8),
        num_classes=10,
        cluster_id=0,
    )
    for fixed_scales in (None, True):
        config = ConsistencyConfig(training=training, fixed_scales=fixed_scales)
        if kind == "dit" and fixed_scales:
            with pytest.raises(StageError, match="its layers: .* LayerNorm"):
                train_consistency(expert, digits(), config, Workspace.at(tmp_path))
        else:
            details = train_consistency(expert, digits(), config, Workspace.at(tmp_path / str(fixed_scales))).details
            assert bool(details["fixed_scales"]) == (kind == "unet")


def test_finest_intervals_below_coarsest_are_an_error():
    with pytest.raises(ValidationError, match="raise finest_intervals"):
        ConsistencyConfig(coarsest_intervals=20, finest_intervals=10)


@pytest.mark.integration
@pytest.mark.parametrize("has_teacher", [False, True])
def test_one_student_step_beats_one_plain_step(has_teacher, teacher, tmp_path):
    config = ConsistencyConfig(steps=1, training=TRAINING, finest_intervals=40, teacher=has_teacher)
    result = train_consistency(teacher, digits(), config, Workspace.at(tmp_path))
    assert distance(generate(result.network)) < 0.6 * distance(generate(teacher))
    assert result.network.few_step.step_types == ("renoise",) and result.network.few_step.is_distilled


@pytest.mark.integration
def test_cauchy_loss_is_robust_to_outliers(tmp_path):
    """sLCT, section 3.2: outliers hardly move a student with the Cauchy loss; the others must be worse."""
    training = TrainingConfig(steps=500, batch_size=128, lr=1e-3, warmup_steps=20)
    distances = {}
    for loss in LOSSES:
        expert, dataset, real = ring_of_gaussians(outliers=0.05)
        config = ConsistencyConfig(loss=loss, steps=1, coupling=False, training=training)
        student = train_consistency(expert, dataset, config, Workspace.at(tmp_path / loss)).network
        distances[loss] = squared_mmd_of(student, real)
    assert distances["cauchy"] <= 0.7 * min(distances["pseudo_huber"], distances["l2"])
