import math

import pytest
import torch

from experts.noise_path import COSINE, PATHS, STRAIGHT, expand, matched


@pytest.mark.parametrize("name", sorted(PATHS))
def test_a_path_goes_from_exactly_clean_to_exactly_noise(name):
    path, ends = PATHS[name], torch.tensor([0.0, 1.0])
    assert path.alpha(ends).tolist() == [1, 0]
    assert path.sigma(ends).tolist() == [0, 1]
    assert path.t_at(path.noise_to_signal(ends)).tolist() == [0, 1]


@pytest.mark.parametrize("name", sorted(PATHS))
def test_slopes_are_the_derivatives(name):
    path = PATHS[name]
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64, requires_grad=True)
    for value, slope in ((path.alpha, path.alpha_dot), (path.sigma, path.sigma_dot)):
        (derivative,) = torch.autograd.grad(value(t * 1).sum(), t)
        torch.testing.assert_close(slope(t), derivative)


@pytest.mark.parametrize("name", sorted(PATHS))
def test_t_at_inverts_the_noise_to_signal_ratio(name):
    t = torch.linspace(0, 1, 21, dtype=torch.float64)
    torch.testing.assert_close(PATHS[name].t_at(PATHS[name].noise_to_signal(t)), t)


def test_known_values():
    half = torch.tensor([0.5])
    assert STRAIGHT.noised(torch.tensor([[2.0]]), torch.tensor([[4.0]]), half).item() == 3
    assert COSINE.alpha(half).item() == pytest.approx(math.sqrt(0.5))
    assert STRAIGHT.velocity(torch.tensor([[2.0]]), torch.tensor([[5.0]]), half).item() == 3


def test_matching_a_path_with_itself_returns_the_very_tensors():
    noised, t = torch.randn(2, 3), torch.rand(2)
    same = matched(noised, t, COSINE, COSINE)
    assert same.noised is noised
    assert same.t is t


def test_expand_leaves_what_already_broadcasts():
    like = torch.zeros(2, 3, 4)
    assert expand(torch.rand(2), like).shape == (2, 1, 1)
    assert expand(torch.rand(2, 3, 1), like).shape == (2, 3, 1)
    assert expand(torch.tensor(0.5), like).shape == ()
