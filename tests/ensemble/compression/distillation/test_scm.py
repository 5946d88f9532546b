"""Continuous-time consistency: the exact consistency function is a fixed point, and training finds it."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from ddm_core.artifacts import Workspace
from ensemble.compression.distillation.config import SCMConfig
from ensemble.compression.distillation.scm import (
    angular_velocity,
    consistency_tangent,
    few_step_of,
    normalize,
    sample_last_step,
    scm_flops,
)
from ensemble.compression.distillation.sign import score_loss
from ensemble.compression.distillation.student import predict_clean, rollout_to
from experts.conditions.condition import Condition
from experts.diffusion.noise_schedule import COSINE, HALF_PI, NOISE_SCHEDULES, expand
from tests.ensemble.compression.distillation.test_mean_flow import BRIEF, DEVIATION, MEAN, ExactTeacher, distill
from tests.ensemble.compression.trained import trained
from tests.oracles import gaussian_velocity

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


@dataclass(frozen=True)
class Fake(ExactTeacher):
    """The exact score of a student's samples, a Gaussian of another deviation."""

    deviation: float

    def velocity(self, noised, t, condition, noise_schedule=None):
        return gaussian_velocity(noised, t, MEAN, self.deviation, noise_schedule or self.noise_schedule)


def test_score_distillation_finds_the_deviation_of_the_data():
    """Reverse divergence of samples mean + deviation noise, whose score is exact, from those of the teacher."""
    schedule = NOISE_SCHEDULES["rectified_flow"]
    deviation = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
    optimizer, generator = torch.optim.Adam([deviation]), torch.Generator().manual_seed(0)
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 150)
        noise, fresh = (torch.randn(ROWS, 2, generator=generator, dtype=torch.float64) for _ in range(2))
        t = torch.rand(ROWS, generator=generator, dtype=torch.float64) * 0.9 + 0.05
        fake = Fake(schedule, float(deviation.detach()))
        sample = MEAN + deviation * noise
        optimizer.zero_grad()
        score_loss(sample, fresh, t, Condition.null(ROWS), ExactTeacher(schedule), fake, 1.0).backward()
        optimizer.step()
    assert float(deviation.detach()) == pytest.approx(DEVIATION, abs=0.02)


def test_score_samples_have_gradients_of_their_last_call_alone(tmp_path):
    student, condition, config = trained("mlp", Workspace.at(tmp_path)), Condition.null(3), SCMConfig(steps=2)
    lasts = set()
    for seed in range(6):
        torch.manual_seed(seed)
        sample = sample_last_step(student, condition, config)
        torch.manual_seed(seed)
        last = int(torch.randint(2, ()))
        noise = [torch.randn(3, 1, 8, 8) for _ in range(last + 1)]
        with torch.no_grad():
            noised = rollout_to(student, noise, condition, few_step_of(config), last)
        expected = predict_clean(student, noised, torch.full((3,), (1.0, 0.5)[last]), condition)
        parameters = [*student.model.parameters()]
        gradients = (torch.autograd.grad(part.square().sum(), parameters) for part in (sample, expected))
        assert torch.equal(sample, expected)
        assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))
        lasts.add(last)
    assert lasts == {0, 1}


def test_the_score_term_changes_the_student_and_is_counted(tmp_path):
    teacher = trained("mlp", Workspace.at(tmp_path / "teacher"))
    plain, scored = (
        distill("scm", teacher, Workspace.at(tmp_path / str(weight)), score_weight=weight).model.state_dict()
        for weight in (0.0, 1.0)
    )
    assert any(not torch.equal(value, plain[name]) for name, value in scored.items())
    settings = {"training": BRIEF, "steps": 1, "guidance": 2.0}
    costs = [scm_flops(1.0, 10.0, SCMConfig(**settings, score_weight=weight)) for weight in (0.0, 1.0)]
    assert costs[1] - costs[0] == 6 * 8 * (7 + 2 * 10)
