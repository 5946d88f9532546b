"""Continuous-time consistency: the exact consistency function is a fixed point, and training finds it."""

import pytest
import torch
from torch import nn

from ensemble.compression.distillation.scm import angular_velocity, consistency_tangent, normalize
from experts.conditions.condition import Condition
from experts.diffusion.noise_schedule import COSINE, HALF_PI, expand
from tests.ensemble.compression.distillation.test_mean_flow import DEVIATION, MEAN, ExactTeacher

ROWS = 128


def slope(deviation, noised, angle):
    """Return F of the consistency function of a Gaussian: f = mean + deviation / spread (x - cos mean)."""
    cos, sin = expand(angle.cos(), noised), expand(angle.sin(), noised)
    spread = ((cos * deviation) ** 2 + sin**2).sqrt()
    return (cos * noised - MEAN - deviation / spread * (noised - cos * MEAN)) / sin


def draw(seed=0):
    generator = torch.Generator().manual_seed(seed)
    clean, noise = (torch.randn(ROWS, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    angle = torch.rand(ROWS, generator=generator, dtype=torch.float64) * 1.4 + 0.1
    noised = COSINE.add_noise(MEAN + DEVIATION * clean, noise, angle / HALF_PI)
    return noised, angle, angular_velocity(ExactTeacher(COSINE), noised, angle, Condition.null(ROWS))


def tangent_of(deviation, noised, angle, velocity, warmup=1.0):
    predicted = slope(deviation, noised, angle)
    return consistency_tangent(
        nn.Identity(), lambda x, s: slope(deviation, x, s), predicted, noised, angle, velocity, warmup
    )


def test_the_exact_consistency_function_is_a_fixed_point():
    points = draw()
    exact, wrong = (tangent_of(value, *points) for value in (DEVIATION, 1.5 * DEVIATION))
    assert exact.abs().max() < 1e-9 and wrong.abs().mean() > 1e-2
    assert tangent_of(DEVIATION, *points, warmup=0.0).abs().mean() > 1e-2, "without its derivative it is not"


def test_the_tangent_is_that_of_the_clean_estimate():
    """g = cos(s) d f / d s along the trajectory, by finite differences."""
    noised, angle, velocity = draw()
    wrong, step = 1.5 * DEVIATION, 1e-6

    def clean(x, s):
        return expand(s.cos(), x) * x - expand(s.sin(), x) * slope(wrong, x, s)

    ahead, behind = (clean(noised + d * velocity, angle + d) for d in (step, -step))
    expected = expand(angle.cos(), noised) * (ahead - behind) / (2 * step)
    torch.testing.assert_close(tangent_of(wrong, noised, angle, velocity), expected, atol=1e-6, rtol=1e-4)


def test_training_on_normalized_tangents_finds_it():
    deviation = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([deviation])
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 150)
        noised, angle, velocity = draw(step)
        predicted = slope(deviation, noised, angle)
        tangent = normalize(tangent_of(deviation.detach(), noised, angle, velocity), 0.1)
        optimizer.zero_grad()
        (predicted - predicted.detach() - tangent).square().mean().backward()
        optimizer.step()
    assert float(deviation.detach()) == pytest.approx(DEVIATION, abs=0.02)


def test_normalized_tangents_have_at_most_unit_length():
    tangent = torch.tensor([[300.0, 400.0], [0.03, 0.04], [0.0, 0.0]])
    lengths = normalize(tangent, 0.1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.tensor([500 / 500.1, 0.05 / 0.15, 0.0]))
