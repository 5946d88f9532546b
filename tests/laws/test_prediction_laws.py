"""Law 2: every prediction leads to every other and back, on every path; matched samples keep their meaning."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.architectures.residual_mlp import ResidualMLP
from experts.condition import Condition
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

inside = st.floats(0.01, 0.99)
path_names = st.sampled_from(sorted(NOISE_SCHEDULES))
predictions = st.sampled_from(["velocity", "noise", "clean"])
seeds = st.integers(0, 2**32 - 1)


def drawn(seed, shape=(3, 2, 4)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]


@given(name=path_names, t=inside, seed=seeds, prediction=predictions)
def test_a_velocity_comes_back_from_every_prediction(name, t, seed, prediction):
    path, t = NOISE_SCHEDULES[name], torch.full((3,), t, dtype=torch.float64)
    velocity, noised = drawn(seed)
    predicted = from_velocity(prediction, velocity, noised, t, path)
    torch.testing.assert_close(to_velocity(prediction, predicted, noised, t, path), velocity, **EXACT)


@given(name=path_names, ts=st.lists(inside, min_size=3, max_size=3), seed=seeds, prediction=predictions)
def test_the_target_of_every_prediction_leads_to_clean_noise_and_velocity(name, ts, seed, prediction):
    path, t = NOISE_SCHEDULES[name], torch.tensor(ts, dtype=torch.float64)
    clean, noise = drawn(seed)
    noised = path.add_noise(clean, noise, t)
    target = training_target(prediction, clean, noise, t, path)
    torch.testing.assert_close(to_clean(prediction, target, noised, t, path), clean, **EXACT)
    torch.testing.assert_close(to_noise(prediction, target, noised, t, path), noise, **EXACT)
    torch.testing.assert_close(
        to_velocity(prediction, target, noised, t, path), path.velocity(clean, noise, t), **EXACT
    )


@pytest.mark.parametrize("prediction", ["velocity", "noise", "clean"])
@pytest.mark.parametrize("name", sorted(NOISE_SCHEDULES))
def test_every_conversion_is_finite_at_both_ends(name, prediction):
    predicted, noised = (value.float() for value in drawn(1, (2, 5)))
    velocity = to_velocity(prediction, predicted, noised, torch.tensor([0.0, 1.0]), NOISE_SCHEDULES[name])
    assert velocity.isfinite().all()


def test_t_may_differ_inside_a_sample():
    path = NOISE_SCHEDULES["cosine"]
    clean, noise = drawn(2)
    t = torch.linspace(0.1, 0.9, 24, dtype=torch.float64).reshape(3, 2, 4)
    noised = path.add_noise(clean, noise, t)
    velocity = to_velocity("noise", noise, noised, t, path)
    torch.testing.assert_close(velocity, path.velocity(clean, noise, t), **EXACT)


@given(source=path_names, target=path_names, t=st.floats(0, 1), seed=seeds)
def test_a_matched_sample_has_the_same_clean_and_noise(source, target, t, seed):
    clean, noise = drawn(seed)
    t = torch.full((3,), t, dtype=torch.float64)
    noised = NOISE_SCHEDULES[source].add_noise(clean, noise, t)
    moved = to_schedule(noised, t, NOISE_SCHEDULES[source], NOISE_SCHEDULES[target])
    torch.testing.assert_close(moved.noised, NOISE_SCHEDULES[target].add_noise(clean, noise, moved.t), **EXACT)


def gaussian_velocity(mean, variance, noised, t, path):
    """E[u | x] for clean ~ N(mean, variance): both parts are regressed linearly on x."""
    t = expand(t, noised)
    alpha, sigma = path.alpha(t), path.sigma(t)
    surprise = (noised - alpha * mean) / (alpha**2 * variance + sigma**2)
    return path.alpha_dot(t) * (mean + alpha * variance * surprise) + path.sigma_dot(t) * sigma * surprise


class GaussianOracle(ResidualMLP):
    """Puts out the exact prediction for clean ~ N(1.5, 0.3) on one path."""

    def forward(self, noised, t, class_index):
        velocity = gaussian_velocity(1.5, 0.3, noised, t, self.path)
        return from_velocity(self.kind, velocity, noised, t, self.path)


def oracle(kind, path, monkeypatch):
    from experts.networks import registry as networks

    model = GaussianOracle(latent_shape=[4])
    model.kind, model.path = kind, path
    monkeypatch.setitem(networks._CALLS, GaussianOracle, networks._call_residual_mlp)
    return Expert(model=model, prediction=kind, noise_schedule=path, latent_shape=(4,), num_classes=0, cluster_id=0)


@pytest.mark.parametrize("kind", ["velocity", "noise", "clean"])
@pytest.mark.parametrize("wanted", sorted(NOISE_SCHEDULES))
@pytest.mark.parametrize("own", sorted(NOISE_SCHEDULES))
def test_an_exact_expert_gives_the_exact_velocity_on_every_path(own, wanted, kind, monkeypatch):
    expert = oracle(kind, NOISE_SCHEDULES[own], monkeypatch)
    noised = torch.linspace(-3, 3, 20, dtype=torch.float64).reshape(5, 4)
    t = torch.tensor([0.02, 0.2, 0.5, 0.8, 0.98], dtype=torch.float64)
    velocity = expert.velocity(noised, t, Condition.null(5), NOISE_SCHEDULES[wanted])
    exact = NOISE_SCHEDULES[wanted].noise_to_signal(t) <= (MAX_NOISE_TO_SIGNAL if kind == "noise" else torch.inf)
    assert exact.sum() >= 3
    expected = gaussian_velocity(1.5, 0.3, noised, t, NOISE_SCHEDULES[wanted])
    torch.testing.assert_close(velocity[exact], expected[exact], **EXACT)
