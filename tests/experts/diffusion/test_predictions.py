"""Where a network is asked, and what is made of its answer."""

import pytest
import torch

from experts.diffusion.noise_schedule import NOISE_SCHEDULES, NoisedSample
from experts.diffusion.predictions import MAX_NOISE_TO_SIGNAL, clamp_noise_level, clean_and_noise_at


def sample(ratio, path):
    t = path.t_at(torch.tensor([ratio], dtype=torch.float64))
    clean, noise = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return clean, noise, NoisedSample(noised=path.add_noise(clean, noise, t), t=t)


def test_below_the_limit_a_sample_is_asked_about_as_it_is():
    for path in NOISE_SCHEDULES.values():
        _, _, given = sample(0.9 * MAX_NOISE_TO_SIGNAL, path)
        seen = clamp_noise_level("noise", given, path)
        assert torch.equal(seen.t, given.t) and torch.equal(seen.noised, given.noised)


def test_above_it_noise_is_asked_for_at_the_limit_and_nothing_else_is():
    for path in NOISE_SCHEDULES.values():
        _, _, given = sample(30 * MAX_NOISE_TO_SIGNAL, path)
        seen = clamp_noise_level("noise", given, path)
        assert path.noise_to_signal(seen.t).item() == pytest.approx(MAX_NOISE_TO_SIGNAL)
        for prediction in ("velocity", "clean"):
            assert clamp_noise_level(prediction, given, path) is given


def test_a_small_error_of_the_noise_stays_small_in_the_clean_sample_at_every_t():
    for path in NOISE_SCHEDULES.values():
        for ratio in (1.0, 20.0, 1e6, float("inf")):
            _, _, given = sample(ratio, path)
            seen = clamp_noise_level("noise", given, path)
            right, wrong = (
                clean_and_noise_at("noise", seen.noised / path.sigma(seen.t) + error, seen, given, path)
                for error in (0, 0.01)
            )
            assert (right.clean - wrong.clean).abs().max() <= 0.011 * MAX_NOISE_TO_SIGNAL


def test_what_is_said_adds_up_to_the_sample():
    for path in NOISE_SCHEDULES.values():
        for ratio in (0.5, 5 * MAX_NOISE_TO_SIGNAL):
            _, noise, given = sample(ratio, path)
            seen = clamp_noise_level("noise", given, path)
            parts = clean_and_noise_at("noise", noise, seen, given, path)
            torch.testing.assert_close(path.add_noise(parts.clean, parts.noise, given.t), given.noised)
