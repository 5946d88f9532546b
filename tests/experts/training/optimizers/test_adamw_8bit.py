"""AdamW with moments of eight bits: refused without its package, and resumed to the bit with it."""

import sys
from dataclasses import replace

import pytest
import torch

from ddm_core.artifacts import Preempted, Workspace
from experts.config import ResidualMLPConfig
from experts.networks.registry import build_network
from experts.training.optimizers.adamw_8bit import build_adamw_8bit, count_adamw_8bit_values, join_moment, split_moment
from experts.training.optimizers.muon import OptimizerError
from experts.training.trainer import fit
from tests.experts.training.test_trainer import SHORT, stopping_at, velocity_loss

CONFIG = replace(SHORT, optimizer="adamw_8bit", steps=6, checkpoint_every=2)


def network():
    torch.manual_seed(3)
    return build_network(ResidualMLPConfig(width=64, depth=1), (6,), 3)


def test_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(OptimizerError, match="pip install torchao"):
        build_adamw_8bit(network(), CONFIG)


def test_moments_of_32_bits_are_stored_as_they_are():
    moment = torch.rand(5)
    assert split_moment(moment) == {"": moment} and join_moment(split_moment(moment)) is moment


def test_its_moments_need_a_quarter_of_the_memory():
    model = torch.nn.Linear(64, 128)
    assert count_adamw_8bit_values(model) == 2 * (64 * 128 // 4 + 32) + 2 * 128


@pytest.mark.integration
def test_stopped_training_continues_to_the_bit(make_dataset, tmp_path):
    """Its step is compiled, for a minute."""
    kind = pytest.importorskip("torchao.optim.subclass_8bit").OptimState8bit

    def train(workspace):
        trained = fit(network(), velocity_loss, make_dataset(shape=(6,)), CONFIG, workspace)
        return trained.model.state_dict(), trained.rows

    expected, rows = train(Workspace.at(tmp_path / "whole"))
    with pytest.raises(Preempted):
        train(stopping_at(3, tmp_path / "stopped"))
    resumed, resumed_rows = train(Workspace.at(tmp_path / "stopped"))
    assert resumed_rows == rows and all(torch.equal(resumed[name], expected[name]) for name in expected)
    moment = join_moment(split_moment(kind.zeros((64, 64))))
    assert isinstance(moment, kind) and moment.signed
