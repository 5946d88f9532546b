import pytest
import torch
from torch import nn
from torch.nn import functional

from experts.training.flops import flop_counter, forward_flops, training_flops


def test_linear_layer_costs_two_flops_a_weight():
    layer, row = nn.Linear(10, 7), torch.zeros(1, 10)
    assert forward_flops(lambda: layer(row)) == 2 * 10 * 7


def test_parameters_may_be_arguments_of_modules_in_inference():
    """Sana gives its last norm a parameter."""
    layer, parameter = nn.Linear(10, 7), nn.Parameter(torch.zeros(1, 10))
    with torch.inference_mode(), flop_counter() as counter:
        layer(parameter)
    assert counter.get_total_flops() == 2 * 10 * 7


def test_attention_is_counted():
    tokens = torch.randn(1, 2, 5, 4)
    products = 2 * (2 * 5 * 5 * 4)
    attended = forward_flops(lambda: functional.scaled_dot_product_attention(tokens, tokens, tokens))
    assert attended == 2 * products


def test_training_costs_three_forward_passes():
    assert training_flops(10.0, 4, 5) == pytest.approx(3 * 10 * 4 * 5)
