"""Derivatives along a direction equal finite differences for every class of network, intervals included."""

import pytest
import torch
from torch import nn

from benchmarks.testbed.backbones import TINY, build, inputs
from ensemble.compression.common.directional_derivative import directional_derivative
from ensemble.compression.method import StageError
from experts.compressed.distillation.interval_embedding import IntervalEmbedding, jumping
from experts.networks.registry import call_network, extend_by_intervals

STEP = 1e-4


@pytest.mark.parametrize("case", TINY)
def test_derivative_equals_a_finite_difference(case):
    model, (noised, t, condition) = extend_by_intervals(build(case)), inputs(case)
    for module in model.modules():
        if isinstance(module, IntervalEmbedding):
            nn.init.normal_(module.outer.weight, std=0.1)
    end = t / 3

    def average(x, time):
        with jumping(model, time - end):
            return call_network(model, x, time, condition)

    along = torch.randn_like(noised)
    derivative = directional_derivative(model, average, (noised, t), along)
    with torch.no_grad():
        ahead, behind = (average(noised + step * along, t + step) for step in (STEP, -STEP))
    difference = (ahead - behind) / (2 * STEP)
    assert not derivative.requires_grad
    assert (derivative - difference).norm() < 0.01 * difference.norm()


def test_a_window_stays_within_its_bounds():
    times = []

    def cubic(x, t):
        times.append(t)
        return x**3

    noised, t = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0.5, 0.99, 0.32])
    velocity, bounds = torch.ones(3, 1), (torch.tensor([0.3] * 3), 1.0)
    derivative = directional_derivative(nn.Identity(), cubic, (noised, t), velocity, 0.1, bounds)
    later, earlier = times
    torch.testing.assert_close(later, torch.tensor([0.6, 1.0, 0.42]))
    torch.testing.assert_close(earlier, torch.tensor([0.4, 0.89, 0.3]))
    ends = (noised + (later - t)[:, None], noised - (t - earlier)[:, None])
    torch.testing.assert_close(derivative, (ends[0] ** 3 - ends[1] ** 3) / (later - earlier)[:, None])
    assert float(derivative[0]) == pytest.approx(3 + 0.1**2, rel=1e-4)


def test_a_layer_without_derivative_is_named_once():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

    model, x = nn.Linear(1, 1), torch.ones(1, 1)
    with pytest.raises(StageError, match="one of Linear has none: .*; raise it"):
        directional_derivative(model, lambda x, t: Opaque.apply(x), (x, x[0]), x)
