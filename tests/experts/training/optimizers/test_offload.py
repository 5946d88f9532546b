"""Moments and averages on the host: the same bits, and nothing of them on the device."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from ddm_core.artifacts import Preempted, Workspace
from experts.architectures.residual_mlp import ResidualMLP
from experts.config import ResidualMLPConfig, TrainingConfig
from experts.networks.registry import build_network
from experts.training.memory import kept_bytes
from experts.training.optimizers.ema import MovingAverage
from experts.training.optimizers.registry import OPTIMIZERS
from experts.training.trainer import fit
from tests.experts.training.test_trainer import SHORT, stopping_at, velocity_loss

OFFLOADED = replace(SHORT, offload=("optimizer", "average"), steps=6, checkpoint_every=2, weight_decay=0.1)


def test_offloaded_training_has_the_bits_of_a_plain_one(make_dataset, tmp_path):
    def train(config, workspace):
        torch.manual_seed(3)
        network = build_network(ResidualMLPConfig(width=32, depth=1), (6,), 3)
        return fit(network, velocity_loss, make_dataset(shape=(6,)), config, workspace).model.state_dict()

    expected = train(replace(OFFLOADED, offload=()), Workspace.at(tmp_path / "plain"))
    with pytest.raises(Preempted):
        train(OFFLOADED, stopping_at(3, tmp_path / "offloaded"))
    resumed = train(OFFLOADED, Workspace.at(tmp_path / "offloaded"))
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


class IgnoreCopies(TorchFunctionMode):
    """Leaves out copies into existing tensors: without a driver, fake tensors of a device cannot be copied to."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0] if func is torch.Tensor.copy_ else func(*args, **(kwargs or {}))


def test_nothing_offloaded_is_on_the_device():
    config = TrainingConfig(offload=("optimizer", "average"))
    with FakeTensorMode(), torch.device("cuda"), IgnoreCopies():
        model = nn.ParameterList([torch.ones(3, 4), torch.ones(4)])
        optimizer, average = OPTIMIZERS["adamw"].build(model, config), MovingAverage(model, 0.1, is_on_host=True)
        for step in (1, 2):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            average.update(step)
            for moments in optimizer.state.values():  # as a checkpoint is read
                moments.update({name: torch.zeros_like(moment, device="cuda") for name, moment in moments.items()})
        optimizer.step()
        with average.applied():
            pass
    moments = [moment for state in optimizer.state.values() for moment in state.values()]
    assert {value.device.type for value in (*moments, *average.average.values())} == {"cpu"}
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}


def test_plan_counts_only_what_stays_on_the_device():
    model = ResidualMLP(latent_shape=[6], num_classes=2, width=16, depth=2)
    whole = kept_bytes(model, OFFLOADED)
    assert (
        kept_bytes(model, OFFLOADED, ("average",)) == whole * 2 // 3
        and kept_bytes(model, OFFLOADED, OFFLOADED.offload) == 0
    )


@pytest.mark.parametrize(
    "settings", [{"optimizer": "muon", "offload": ("optimizer",)}, {"parallel": "fsdp", "offload": ("average",)}]
)
def test_what_cannot_be_offloaded_is_refused(settings):
    with pytest.raises(ValidationError, match="offload.* needs"):
        TrainingConfig(**settings)
