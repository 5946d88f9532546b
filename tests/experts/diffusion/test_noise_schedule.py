import math

import diffusers
import pytest
import torch

from experts.diffusion.noise_schedule import (
    COSINE,
    LINEAR_BETA,
    NOISE_SCHEDULES,
    RECTIFIED_FLOW,
    TIMESTEP,
    expand,
    to_schedule,
)


@pytest.mark.parametrize("name", sorted(NOISE_SCHEDULES))
def test_schedule_is_exact_at_both_ends(name):
    schedule, ends = NOISE_SCHEDULES[name], torch.tensor([0.0, 1.0])
    assert schedule.alpha(ends).tolist() == [1, 0]
    assert schedule.sigma(ends).tolist() == [0, 1]
    assert schedule.t_at(schedule.noise_to_signal(ends)).tolist() == [0, 1]


@pytest.mark.parametrize("name", sorted(NOISE_SCHEDULES))
def test_slopes_equal_autograd_derivatives(name):
    schedule = NOISE_SCHEDULES[name]
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64, requires_grad=True)
    for value, slope in ((schedule.alpha, schedule.alpha_dot), (schedule.sigma, schedule.sigma_dot)):
        (derivative,) = torch.autograd.grad(value(t * 1).sum(), t)
        torch.testing.assert_close(slope(t), derivative)


@pytest.mark.parametrize("name", sorted(NOISE_SCHEDULES))
def test_t_at_inverts_the_noise_to_signal_ratio(name):
    t = torch.linspace(0, 1, 21, dtype=torch.float64)
    torch.testing.assert_close(NOISE_SCHEDULES[name].t_at(NOISE_SCHEDULES[name].noise_to_signal(t)), t)


def test_known_values_are_reproduced():
    middle = torch.tensor([0.5])
    assert RECTIFIED_FLOW.add_noise(torch.tensor([[2.0]]), torch.tensor([[4.0]]), middle).item() == 3
    assert COSINE.alpha(middle).item() == pytest.approx(math.sqrt(0.5))
    assert RECTIFIED_FLOW.velocity(torch.tensor([[2.0]]), torch.tensor([[5.0]]), middle).item() == 3


def test_conversion_to_same_schedule_returns_same_tensors():
    noised, t = torch.randn(2, 3), torch.rand(2)
    same = to_schedule(noised, t, COSINE, COSINE)
    assert same.noised is noised
    assert same.t is t


def test_expand_leaves_broadcastable_t_unchanged():
    like = torch.zeros(2, 3, 4)
    assert expand(torch.rand(2), like).shape == (2, 1, 1)
    assert expand(torch.rand(2, 3, 1), like).shape == (2, 3, 1)
    assert expand(torch.tensor(0.5), like).shape == ()


def test_linear_beta_matches_ddpm_at_its_timesteps():
    alphas_bar = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear").alphas_cumprod.double()
    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    alpha, sigma = LINEAR_BETA.alpha(t)[:-1], LINEAR_BETA.sigma(t)[:-1]
    torch.testing.assert_close(alpha, alphas_bar.sqrt()[:-1], rtol=0.035, atol=0)
    torch.testing.assert_close(sigma, (1 - alphas_bar).sqrt()[:-1], rtol=0.05, atol=0)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(999, dtype=torch.float64))


TABLES = {"ddpm_linear": ("linear", 1e-4, 0.02), "scaled_linear": ("scaled_linear", 0.00085, 0.012)}


@pytest.mark.parametrize("name", TABLES)
def test_table_has_the_log_snr_of_its_timesteps(name):
    kind, start, end = TABLES[name]
    table = diffusers.DDPMScheduler(1000, beta_start=start, beta_end=end, beta_schedule=kind).alphas_cumprod.double()
    t, schedule = torch.arange(1000, dtype=torch.float64)[1:] / 1000, NOISE_SCHEDULES[name]
    log_snr = -2 * schedule.noise_to_signal(t).log()
    torch.testing.assert_close(log_snr, (table / (1 - table)).log()[1:], rtol=0, atol=1e-3)
    single = NOISE_SCHEDULES[name].noise_to_signal(t.float()).double()
    torch.testing.assert_close(single, schedule.noise_to_signal(t), rtol=1e-4, atol=0)


def test_conversion_maps_to_timestep_of_equal_ratio():
    alphas_bar = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear").alphas_cumprod.double()
    steps = torch.tensor([20, 100, 400, 700, 900])
    ratio = ((1 - alphas_bar[steps]) / alphas_bar[steps]).sqrt()
    converted = to_schedule(torch.ones(5, 3, dtype=torch.float64), ratio / (1 + ratio), RECTIFIED_FLOW, LINEAR_BETA)
    torch.testing.assert_close(converted.t * 1000, (steps + 1).double(), rtol=0.02, atol=2)
    torch.testing.assert_close(converted.noised[:, 0], alphas_bar[steps].sqrt() * (1 + ratio), rtol=0.035, atol=0)


@pytest.mark.parametrize("name", sorted(NOISE_SCHEDULES))
def test_t_at_inverts_the_ratio_close_to_the_ends(name):
    t = torch.tensor([1e-4, 9e-4, 1.1e-3, 0.9985, 0.9995, 0.9999], dtype=torch.float64)
    torch.testing.assert_close(
        NOISE_SCHEDULES[name].t_at(NOISE_SCHEDULES[name].noise_to_signal(t)), t, rtol=1e-8, atol=0
    )


def test_linear_beta_is_continuous_at_its_linear_pieces():
    for edge in (TIMESTEP, 1 - TIMESTEP):
        t = torch.tensor([edge - 1e-12, edge + 1e-12], dtype=torch.float64)
        for value in (LINEAR_BETA.alpha(t), LINEAR_BETA.sigma(t)):
            torch.testing.assert_close(value[0], value[1], rtol=1e-6, atol=1e-9)
