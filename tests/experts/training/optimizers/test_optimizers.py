from typing import get_args

import pytest
import torch
from torch import nn

from experts.architectures.residual_mlp import ResidualMLP
from experts.config import OptimizerName, TrainingConfig
from experts.training.optimizers.muon import OptimizerError, find_matrices
from experts.training.optimizers.registry import OPTIMIZERS


def build(name, **settings):
    torch.manual_seed(0)
    model = ResidualMLP(latent_shape=[6], num_classes=2, width=16, depth=2)
    return model, OPTIMIZERS[name].build(model, TrainingConfig(optimizer=name, **settings))


def step(model, optimizer):
    """Update by a gradient that is a function of the parameter's shape alone."""
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    optimizer.step()


def test_every_name_has_an_optimizer():
    assert set(OPTIMIZERS) == set(get_args(OptimizerName))


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.keys() - {"adamw_8bit"}))
def test_counted_values_are_those_of_the_state(name):
    model, optimizer = build(name)
    step(model, optimizer)
    values = sum(v.numel() for moments in optimizer.state.values() for v in moments.values() if v.ndim)
    assert OPTIMIZERS[name].count_values(model.to("meta")) == values


def test_muon_orthogonalizes_updates_of_block_matrices_only():
    (muon, by_muon), (adamw, by_adamw) = (
        build("muon", lr=0.1, weight_decay=0.1),
        build("adamw", lr=0.1, weight_decay=0.1),
    )
    before = {name: parameter.detach().clone() for name, parameter in muon.named_parameters()}
    step(muon, by_muon)
    step(adamw, by_adamw)
    expected = {f"blocks.{block}.{layer}.weight" for block in range(2) for layer in ("inner", "outer")}
    others = dict(adamw.named_parameters())
    assert expected == {name for name, value in muon.named_parameters() if not torch.equal(value, others[name])}
    for name in expected:
        update = (before[name] * (1 - 0.1 * 0.1) - muon.get_parameter(name)) / (0.1 * 0.2 * 16**0.5)
        singular = torch.linalg.svdvals(update.detach())
        assert singular.min() > 0.3 and singular.max() < 1.6, "Newton-Schulz steps leave about .5 to 1.5"


def test_frozen_matrices_are_not_of_muon():
    model, _ = build("adamw")
    model.blocks[0].requires_grad_(False)
    assert len(find_matrices(model)) == 2


def test_betas_and_momentum_reach_the_optimizers():
    groups = build("muon", betas=(0.8, 0.9), momentum=0.5)[1].param_groups
    assert groups[0]["momentum"] == 0.5 and groups[1]["betas"] == (0.8, 0.9)


def test_network_without_matrices_is_refused():
    with pytest.raises(OptimizerError, match=r"Linear has none; set training\.optimizer=adamw"):
        OPTIMIZERS["muon"].build(nn.Linear(3, 3), TrainingConfig(optimizer="muon"))
