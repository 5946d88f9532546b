import pytest
import torch
from torch import nn

from experts.training.ema import MovingAverage, power_law_gamma


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2, 0.27])
def test_gamma_inverts_the_relative_width(width):
    gamma = power_law_gamma(width)
    assert (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5) == pytest.approx(width)


def test_average_equals_power_function_average():
    values = torch.linspace(-1, 2, 40, dtype=torch.float64).sin() * 3
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    average = MovingAverage(model, 0.15)
    for step, value in enumerate(values, start=1):
        nn.init.constant_(model.weight, value.item())
        average.update(step)
    power = power_law_gamma(0.15) + 1
    edges = torch.arange(41, dtype=torch.float64) ** power
    expected = (edges.diff() / edges[-1] * values).sum()
    torch.testing.assert_close(average.average["weight"].squeeze(), expected)


def test_average_weights_have_the_relative_width():
    """Compare the standard deviation of the averaged step with the number of steps."""
    count, power = 4000, power_law_gamma(0.1) + 1
    steps = torch.arange(count, dtype=torch.float64) + 0.5
    weights = (torch.arange(count + 1, dtype=torch.float64) ** power).diff() / float(count) ** power
    mean = (weights * steps).sum()
    assert ((weights * (steps - mean) ** 2).sum().sqrt() / count).item() == pytest.approx(0.1, rel=1e-3)


def test_copy_to_overwrites_only_the_given_model():
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    average = MovingAverage(model, 0.1)
    expected = model.weight.detach().clone()
    nn.init.zeros_(model.weight)
    average.copy_to(other)
    torch.testing.assert_close(other.weight, expected)
    assert not model.weight.any()
