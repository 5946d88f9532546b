"""Consistency once for all clusters, then an adapter for each: what starts where, and what is trained."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from ddm_core.artifacts import Preempted, Workspace
from ensemble.compression.distillation.config import ConsistencyConfig
from ensemble.compression.distillation.consistency import train_consistency
from ensemble.compression.distillation.shared_student import SharedWarmup, add_change
from ensemble.compression.method import StageError
from experts.conditions.condition import Condition
from experts.config import DiTConfig, UNetConfig
from experts.expert import Expert
from experts.networks.lora import add_new_lora, layers_above_rank, merge_lora
from experts.networks.registry import build_network, call_network
from tests.ensemble.compression.distillation.test_mean_flow import BRIEF
from tests.ensemble.compression.trained import digits, trained

NETWORKS = {"unet": UNetConfig(channels=(16, 16)), "dit": DiTConfig(depth=1)}
ADAPTED = ConsistencyConfig(training=replace(BRIEF, lr=0.01), adapter_rank=2, coupling=False)


def differences(first, second):
    """Return the rank of the change of every parameter that changed."""
    ranks = {}
    for (name, before), after in zip(first.named_parameters(), second.parameters(), strict=True):
        if not torch.equal(before, after):
            ranks[name] = int(torch.linalg.matrix_rank((after - before).detach().double().flatten(1), rtol=1e-4))
    return ranks


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return trained("mlp", Workspace.at(tmp_path_factory.mktemp("mlp")))


@pytest.mark.parametrize("kind", NETWORKS)
def test_new_adapters_change_nothing_and_merged_ones_stay(kind):
    torch.manual_seed(0)
    network = build_network(NETWORKS[kind], (1, 8, 8), 10)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    row = torch.randn(3, 1, 8, 8), torch.full((3,), 0.4), Condition.null(3)
    before, names = call_network(network, *row), set(network.state_dict())
    layers = layers_above_rank(network, 2)
    kinds = {type(network.get_submodule(path)).__name__ for path in layers}
    add_new_lora(network, layers, 2)
    assert torch.equal(call_network(network, *row), before)
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted = call_network(network, *row)
    merge_lora(network)
    assert set(network.state_dict()) == names and not torch.allclose(adapted, before)
    torch.testing.assert_close(call_network(network, *row), adapted, atol=1e-4, rtol=1e-4)
    assert kinds == {"Linear", "Conv2d"}


def test_an_adapted_student_differs_by_matrices_of_its_rank(teacher, tmp_path):
    torch.manual_seed(1)
    start = deepcopy(teacher.model)
    with torch.no_grad():
        for parameter in start.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    result = train_consistency(teacher, digits(), ADAPTED, Workspace.at(tmp_path / "a"), start)
    ranks = differences(start, result.network.model)
    assert ranks and set(ranks.values()) <= {1, 2}
    assert all(parameter.requires_grad for parameter in result.network.model.parameters())
    assert 0 < result.details["trained_share"] < 0.2
    result.network.save(tmp_path / "student")
    assert not differences(Expert.load(tmp_path / "student").model, result.network.model)


def test_a_resumed_adapter_is_bit_identical(teacher, tmp_path):
    torch.manual_seed(1)
    whole = train_consistency(teacher, digits(), ADAPTED, Workspace.at(tmp_path / "whole")).network.model
    torch.manual_seed(2)
    stops = iter([False, False, False, True])
    halves = Workspace.at(tmp_path / "halves")
    with pytest.raises(Preempted):
        train_consistency(teacher, digits(), ADAPTED, replace(halves, stopping=lambda: next(stops)))
    assert not differences(whole, train_consistency(teacher, digits(), ADAPTED, halves).network.model)


def test_an_adapter_that_no_layer_is_larger_than_is_refused(teacher, tmp_path):
    with pytest.raises(StageError, match="adapter_rank=4096 is no smaller than any layer of expert 0; lower it"):
        train_consistency(teacher, digits(), replace(ADAPTED, adapter_rank=4096), Workspace.at(tmp_path))


def test_students_start_from_the_shared_one_or_its_change(teacher):
    first, trained_network = (deepcopy(teacher.model) for _ in range(2))
    with torch.no_grad():
        for parameter in trained_network.parameters():
            parameter.add_(0.5)
    expert = replace(teacher, model=add_change(teacher.model, first, trained_network))  # its parameters less a half
    warmup = SharedWarmup(student=trained_network, start=first, flops=0.0)
    student, change = (ConsistencyConfig(shared_warmup_steps=1, shared_start=start) for start in ("student", "change"))
    assert warmup.start_of(expert, student) is trained_network
    changed = warmup.start_of(expert, change)
    for got, wanted in zip(changed.parameters(), first.parameters(), strict=True):
        torch.testing.assert_close(got, wanted)
    assert not torch.equal(next(expert.model.parameters()), next(changed.parameters()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shared_start": "change"}, "shared_warmup_steps=0 has none; set shared_warmup_steps"),
        ({"shared_warmup_steps": 3, "students": "shared"}, r"with distill\.students=shared set"),
    ],
)
def test_settings_of_a_warmup_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        ConsistencyConfig(**settings)
