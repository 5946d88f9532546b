"""Where a network is asked, and what is made of its answer."""

import pytest
import torch

from experts.diffusion.noise_schedule import PATHS, Matched
from experts.diffusion.predictions import MOST_NOISE, asked, parts_said


def sample(ratio, path):
    t = path.t_at(torch.tensor([ratio], dtype=torch.float64))
    clean, noise = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return clean, noise, Matched(noised=path.noised(clean, noise, t), t=t)


def test_below_the_limit_a_sample_is_asked_about_as_it_is():
    for path in PATHS.values():
        _, _, given = sample(0.9 * MOST_NOISE, path)
        seen = asked("noise", given, path)
        assert torch.equal(seen.t, given.t) and torch.equal(seen.noised, given.noised)


def test_above_it_noise_is_asked_for_at_the_limit_and_nothing_else_is():
    for path in PATHS.values():
        _, _, given = sample(30 * MOST_NOISE, path)
        seen = asked("noise", given, path)
        assert path.noise_to_signal(seen.t).item() == pytest.approx(MOST_NOISE)
        for prediction in ("velocity", "clean"):
            assert asked(prediction, given, path) is given


def test_a_small_error_of_the_noise_stays_small_in_the_clean_sample_at_every_t():
    for path in PATHS.values():
        for ratio in (1.0, 20.0, 1e6, float("inf")):
            _, _, given = sample(ratio, path)
            seen = asked("noise", given, path)
            right, wrong = (
                parts_said("noise", seen.noised / path.sigma(seen.t) + error, seen, given, path) for error in (0, 0.01)
            )
            assert (right.clean - wrong.clean).abs().max() <= 0.011 * MOST_NOISE


def test_what_is_said_adds_up_to_the_sample():
    for path in PATHS.values():
        for ratio in (0.5, 5 * MOST_NOISE):
            _, noise, given = sample(ratio, path)
            seen = asked("noise", given, path)
            parts = parts_said("noise", noise, seen, given, path)
            torch.testing.assert_close(path.noised(parts.clean, parts.noise, given.t), given.noised)
