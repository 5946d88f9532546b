from math import pi
from typing import get_args

import pytest
import torch

from experts.config import ExpertConfig, LossWeightName
from experts.diffusion.loss_weights import LOSS_WEIGHTS, build_loss_weight, min_snr_weight, velocity_weight
from experts.diffusion.noise_schedule import COSINE, NOISE_SCHEDULES, RECTIFIED_FLOW
from experts.diffusion.predictions import MAX_NOISE_TO_SIGNAL, from_velocity, to_clean

GAMMA = 5.0
T = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
SNR = (1 / torch.tan(pi * T / 2)) ** 2
"""On the cosine schedule."""


def test_every_name_has_a_weight():
    assert set(LOSS_WEIGHTS) == set(get_args(LossWeightName))
    assert build_loss_weight(ExpertConfig()) is None


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("clean", SNR.clamp(max=GAMMA)),
        ("noise", SNR.clamp(max=GAMMA) / SNR),
        ("velocity", SNR.clamp(max=GAMMA) / (SNR + 1) * (2 / pi) ** 2),
    ],
)
def test_min_snr_has_the_closed_form_of_its_paper(prediction, expected):
    """The velocity of a variance-preserving schedule is pi / 2 times the paper's v on the cosine schedule."""
    weight = build_loss_weight(ExpertConfig(loss_weight="min_snr", min_snr_gamma=GAMMA))
    torch.testing.assert_close(weight(prediction, T, COSINE), expected)


def test_min_snr_of_rectified_flow_velocity_in_closed_form():
    weight = min_snr_weight("velocity", T, RECTIFIED_FLOW, GAMMA)
    torch.testing.assert_close(weight, ((1 - T) ** 2).minimum(GAMMA * T**2))


@pytest.mark.parametrize("name", NOISE_SCHEDULES)
@pytest.mark.parametrize("prediction", ["velocity", "noise"])
def test_every_prediction_has_the_loss_of_the_clean_sample(prediction, name):
    schedule = NOISE_SCHEDULES[name]
    generator = torch.Generator().manual_seed(0)
    noised, first, second = (torch.randn(len(T), 3, generator=generator, dtype=T.dtype) for _ in range(3))
    cleans = [to_clean("velocity", velocity, noised, T, schedule) for velocity in (first, second)]
    outputs = [from_velocity(prediction, velocity, noised, T, schedule) for velocity in (first, second)]
    expected = min_snr_weight("clean", T, schedule, GAMMA)[:, None] * (cleans[0] - cleans[1]).square()
    actual = min_snr_weight(prediction, T, schedule, GAMMA)[:, None] * (outputs[0] - outputs[1]).square()
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", NOISE_SCHEDULES)
@pytest.mark.parametrize("prediction", ["velocity", "noise", "clean"])
def test_min_snr_is_finite_at_both_ends(prediction, name):
    weight = min_snr_weight(prediction, torch.tensor([0.0, 1.0]), NOISE_SCHEDULES[name], GAMMA)
    assert weight.isfinite().all() and (weight >= 0).all()


@pytest.mark.parametrize("name", NOISE_SCHEDULES)
@pytest.mark.parametrize("prediction", ["noise", "clean"])
def test_predictions_have_the_loss_of_their_velocity(prediction, name):
    schedule = NOISE_SCHEDULES[name]
    ratio = schedule.noise_to_signal(T)
    inside = ratio < MAX_NOISE_TO_SIGNAL if prediction == "noise" else ratio > 1 / MAX_NOISE_TO_SIGNAL
    generator = torch.Generator().manual_seed(0)
    noised, first, second = (torch.randn(len(T), 3, generator=generator, dtype=T.dtype) for _ in range(3))
    outputs = [from_velocity(prediction, velocity, noised, T, schedule) for velocity in (first, second)]
    weight = build_loss_weight(ExpertConfig(loss_weight="velocity"))(prediction, T, schedule)
    actual = weight[:, None] * (outputs[0] - outputs[1]).square()
    assert 10 < inside.sum() < len(T)
    torch.testing.assert_close(actual[inside], (first - second).square()[inside])
    assert (actual[~inside] < (first - second).square()[~inside]).all()


@pytest.mark.parametrize("name", NOISE_SCHEDULES)
@pytest.mark.parametrize("prediction", ["velocity", "noise", "clean"])
def test_velocity_weight_is_finite_at_both_ends(prediction, name):
    weight = velocity_weight(prediction, torch.tensor([0.0, 1.0]), NOISE_SCHEDULES[name], GAMMA)
    assert weight.isfinite().all() and (weight > 0).all()
