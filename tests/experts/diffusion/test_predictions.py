"""Clamped noise levels, and the parts of a sample from a clamped prediction."""

import pytest
import torch

from experts.diffusion.noise_schedule import NOISE_SCHEDULES, NoisedSample
from experts.diffusion.predictions import MAX_NOISE_TO_SIGNAL, clamp_noise_level, clean_and_noise_at


def sample(ratio, schedule):
    t = schedule.t_at(torch.tensor([ratio], dtype=torch.float64))
    clean, noise = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return clean, noise, NoisedSample(noised=schedule.add_noise(clean, noise, t), t=t)


def test_sample_below_the_limit_is_unchanged():
    for schedule in NOISE_SCHEDULES.values():
        _, _, noised_sample = sample(0.9 * MAX_NOISE_TO_SIGNAL, schedule)
        network_input = clamp_noise_level("noise", noised_sample, schedule)
        assert torch.equal(network_input.t, noised_sample.t) and torch.equal(network_input.noised, noised_sample.noised)


def test_only_noise_prediction_is_clamped_above_the_limit():
    for schedule in NOISE_SCHEDULES.values():
        _, _, noised_sample = sample(30 * MAX_NOISE_TO_SIGNAL, schedule)
        network_input = clamp_noise_level("noise", noised_sample, schedule)
        assert schedule.noise_to_signal(network_input.t).item() == pytest.approx(MAX_NOISE_TO_SIGNAL)
        for prediction in ("velocity", "clean"):
            assert clamp_noise_level(prediction, noised_sample, schedule) is noised_sample


def test_noise_error_stays_small_in_the_clean_estimate():
    for schedule in NOISE_SCHEDULES.values():
        for ratio in (1.0, 20.0, 1e6, float("inf")):
            _, _, noised_sample = sample(ratio, schedule)
            network_input = clamp_noise_level("noise", noised_sample, schedule)
            noise = network_input.noised / schedule.sigma(network_input.t)
            exact, perturbed = (
                clean_and_noise_at("noise", noise + error, network_input, noised_sample, schedule)
                for error in (0, 0.01)
            )
            assert (exact.clean - perturbed.clean).abs().max() <= 0.011 * MAX_NOISE_TO_SIGNAL


def test_parts_add_up_to_the_noised_sample():
    for schedule in NOISE_SCHEDULES.values():
        for ratio in (0.5, 5 * MAX_NOISE_TO_SIGNAL):
            _, noise, noised_sample = sample(ratio, schedule)
            network_input = clamp_noise_level("noise", noised_sample, schedule)
            parts = clean_and_noise_at("noise", noise, network_input, noised_sample, schedule)
            torch.testing.assert_close(
                schedule.add_noise(parts.clean, parts.noise, noised_sample.t), noised_sample.noised
            )
