"""Law 2: every prediction converts to every other and back, on every noise schedule; so do noised samples."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.architectures.residual_mlp import ResidualMLP
from experts.conditions.condition import Condition
from experts.diffusion.noise_schedule import NOISE_SCHEDULES, expand, to_schedule
from experts.diffusion.predictions import (
    MAX_NOISE_TO_SIGNAL,
    from_velocity,
    to_clean,
    to_noise,
    to_velocity,
    training_target,
)
from experts.expert import Expert

EXACT = {"rtol": 1e-9, "atol": 1e-9}

interior_t = st.floats(0.01, 0.99)
schedule_names = st.sampled_from(sorted(NOISE_SCHEDULES))
predictions = st.sampled_from(["velocity", "noise", "clean"])
seeds = st.integers(0, 2**32 - 1)


def random_pair(seed, shape=(3, 2, 4)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]


@given(name=schedule_names, t=interior_t, seed=seeds, prediction=predictions)
def test_velocity_is_recovered_from_every_prediction(name, t, seed, prediction):
    schedule, t = NOISE_SCHEDULES[name], torch.full((3,), t, dtype=torch.float64)
    velocity, noised = random_pair(seed)
    predicted = from_velocity(prediction, velocity, noised, t, schedule)
    torch.testing.assert_close(to_velocity(prediction, predicted, noised, t, schedule), velocity, **EXACT)


@given(name=schedule_names, ts=st.lists(interior_t, min_size=3, max_size=3), seed=seeds, prediction=predictions)
def test_training_target_converts_to_every_quantity(name, ts, seed, prediction):
    schedule, t = NOISE_SCHEDULES[name], torch.tensor(ts, dtype=torch.float64)
    clean, noise = random_pair(seed)
    noised = schedule.add_noise(clean, noise, t)
    target = training_target(prediction, clean, noise, t, schedule)
    torch.testing.assert_close(to_clean(prediction, target, noised, t, schedule), clean, **EXACT)
    torch.testing.assert_close(to_noise(prediction, target, noised, t, schedule), noise, **EXACT)
    torch.testing.assert_close(
        to_velocity(prediction, target, noised, t, schedule), schedule.velocity(clean, noise, t), **EXACT
    )


@pytest.mark.parametrize("prediction", ["velocity", "noise", "clean"])
@pytest.mark.parametrize("name", sorted(NOISE_SCHEDULES))
def test_conversions_are_finite_at_both_ends(name, prediction):
    predicted, noised = (value.float() for value in random_pair(1, (2, 5)))
    velocity = to_velocity(prediction, predicted, noised, torch.tensor([0.0, 1.0]), NOISE_SCHEDULES[name])
    assert velocity.isfinite().all()


def test_t_may_differ_within_a_sample():
    schedule = NOISE_SCHEDULES["cosine"]
    clean, noise = random_pair(2)
    t = torch.linspace(0.1, 0.9, 24, dtype=torch.float64).reshape(3, 2, 4)
    noised = schedule.add_noise(clean, noise, t)
    velocity = to_velocity("noise", noise, noised, t, schedule)
    torch.testing.assert_close(velocity, schedule.velocity(clean, noise, t), **EXACT)


@given(source=schedule_names, target=schedule_names, t=st.floats(0, 1), seed=seeds)
def test_schedule_conversion_keeps_clean_and_noise(source, target, t, seed):
    clean, noise = random_pair(seed)
    t = torch.full((3,), t, dtype=torch.float64)
    noised = NOISE_SCHEDULES[source].add_noise(clean, noise, t)
    converted = to_schedule(noised, t, NOISE_SCHEDULES[source], NOISE_SCHEDULES[target])
    torch.testing.assert_close(converted.noised, NOISE_SCHEDULES[target].add_noise(clean, noise, converted.t), **EXACT)


def gaussian_velocity(mean, variance, noised, t, schedule):
    """Return E[u | x] for clean ~ N(mean, variance): both parts are linear regressions on x."""
    t = expand(t, noised)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    surprise = (noised - alpha * mean) / (alpha**2 * variance + sigma**2)
    return schedule.alpha_dot(t) * (mean + alpha * variance * surprise) + schedule.sigma_dot(t) * sigma * surprise


class GaussianOracle(ResidualMLP):
    """Returns the exact prediction for clean ~ N(1.5, 0.3) on one noise schedule."""

    def forward(self, noised, t, class_index, pooled_text=None):
        velocity = gaussian_velocity(1.5, 0.3, noised, t, self.schedule)
        return from_velocity(self.kind, velocity, noised, t, self.schedule)


def oracle(kind, schedule, monkeypatch):
    from experts.networks import registry as networks

    model = GaussianOracle(latent_shape=[4])
    model.kind, model.schedule = kind, schedule
    monkeypatch.setitem(networks.CALLS, "GaussianOracle", networks.CALLS["ResidualMLP"])
    return Expert(model=model, prediction=kind, noise_schedule=schedule, latent_shape=(4,), num_classes=0, cluster_id=0)


@pytest.mark.parametrize("kind", ["velocity", "noise", "clean"])
@pytest.mark.parametrize("target", sorted(NOISE_SCHEDULES))
@pytest.mark.parametrize("source", sorted(NOISE_SCHEDULES))
def test_exact_expert_has_exact_velocity_on_every_schedule(source, target, kind, monkeypatch):
    expert = oracle(kind, NOISE_SCHEDULES[source], monkeypatch)
    noised = torch.linspace(-3, 3, 20, dtype=torch.float64).reshape(5, 4)
    t = torch.tensor([0.02, 0.2, 0.5, 0.8, 0.98], dtype=torch.float64)
    velocity = expert.velocity(noised, t, Condition.null(5), NOISE_SCHEDULES[target])
    exact = NOISE_SCHEDULES[target].noise_to_signal(t) <= (MAX_NOISE_TO_SIGNAL if kind == "noise" else torch.inf)
    assert exact.sum() >= 3
    expected = gaussian_velocity(1.5, 0.3, noised, t, NOISE_SCHEDULES[target])
    torch.testing.assert_close(velocity[exact], expected[exact], **EXACT)
