"""Inputs that are rounded by the time: the nearest grid a row, and networks that keep their clock."""

import copy
import json

import pytest
import torch
from torch import nn

from ddm_core.artifacts import CorruptArtifact
from experts.compressed.quantization.activation_quant import (
    TimestepActivationQuantizer,
    TimestepRecorder,
    quantize_input,
)
from experts.compressed.quantization.packed_weight import pack_weight
from experts.compressed.quantization.packing import Packing
from experts.condition import Condition
from experts.config import DiTConfig, ResidualMLPConfig, UNetConfig
from experts.networks.model_io import FORMS, save_model
from experts.networks.registry import build_network, call_network, load_network

SHAPE = (1, 8, 8)
NETWORKS = (
    ResidualMLPConfig(width=32, depth=1),
    UNetConfig(channels=(8, 16), layers_per_block=1),
    DiTConfig(patch_size=4, heads=2, head_width=16, depth=1),
)


def network(config, bits=4):
    torch.manual_seed(0)
    model = build_network(config, SHAPE, 3).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    unit = 1.0 if config.kind == "residual_mlp" else 1000.0
    layers = [path for path, found in model.named_modules() if isinstance(found, nn.Linear | nn.Conv2d)]
    for path in layers:
        form = quantize_input(model, path, 3, bits)
        form.times.copy_(unit * torch.tensor([0.1, 0.5, 0.9]))
        form.steps.copy_(torch.tensor([0.1, 0.3, 0.6]))
        form.zeros.fill_(2 ** (bits - 1))
    return model


def said(model, t, rows=5):
    noised = torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return call_network(model, noised, t, Condition.null(rows))


def test_every_row_is_rounded_on_the_grid_of_the_nearest_time():
    clock = TimestepRecorder()
    form = TimestepActivationQuantizer(clock, 2, 4)
    form.times.copy_(torch.tensor([0.2, 0.8]))
    form.steps.copy_(torch.tensor([1.0, 0.5]))
    form.zeros.copy_(torch.tensor([8.0, 0.0]))
    clock.now = torch.tensor([0.0, 0.49, 0.51, 3.0])
    x = torch.tensor([-1.3, 0.7, 9.0]).expand(4, 2, 3)
    rounded = form(x)[:, 0].tolist()
    assert rounded == [[-1.0, 1.0, 7.0]] * 2 + [[0.0, 0.5, 7.5]] * 2


def test_a_layer_called_without_its_network_says_so():
    with pytest.raises(RuntimeError, match="call the whole network"):
        TimestepActivationQuantizer(TimestepRecorder(), 2, 4)(torch.zeros(3, 2))


@pytest.mark.parametrize("config", NETWORKS, ids=lambda config: config.kind)
def test_a_row_is_the_same_alone_and_beside_rows_of_other_times(config):
    model, t = network(config, 8), torch.tensor([0.0, 0.2, 0.5, 0.7, 1.0])
    together = said(model, t)
    noised = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(1))
    for row in range(5):
        with torch.no_grad():
            alone = call_network(model, noised[row : row + 1], t[row : row + 1], Condition.null(1))
        error = (alone[0] - together[row]).norm() / together[row].norm()
        assert error < 0.05
    assert not torch.equal(said(model, torch.tensor(0.1)), said(model, torch.tensor(0.9)))


@pytest.mark.parametrize("config", NETWORKS, ids=lambda config: config.kind)
def test_a_network_is_saved_loaded_and_copied_bit_for_bit(config, tmp_path):
    model, t = network(config), torch.rand(5, generator=torch.Generator().manual_seed(2))
    for name in [name for name, weight in model.named_parameters() if weight.ndim > 1]:
        packing = Packing(bits=4, group_size=16, shape=tuple(model.get_parameter(name).shape))
        pack_weight(model, name, packing)
    save_model(model, tmp_path / "a")
    save_model(load_network(tmp_path / "a"), tmp_path / "b")
    assert torch.equal(said(load_network(tmp_path / "b"), t), said(model, t))
    twin = copy.deepcopy(model)
    assert torch.equal(said(twin, t), said(model, t))
    said(twin, torch.tensor(0.9))
    clocks = [
        {form.clock for form in one.modules() if isinstance(form, TimestepActivationQuantizer)} for one in (model, twin)
    ]
    assert [len(found) for found in clocks] == [1, 1] and not clocks[0] & clocks[1]
    assert torch.equal(clocks[0].pop().now, t if config.kind == "residual_mlp" else t * 1000)


def test_step_sizes_that_have_learnt_are_kept():
    form = TimestepActivationQuantizer(TimestepRecorder(), 2, 4)
    form.clock.now = torch.tensor([0.0])
    form.make_learnable()
    form.log_change.data.copy_(torch.tensor([0.01, -0.02]))
    x = torch.linspace(-1, 1, 9)[None]
    before = form(x)
    form.freeze()
    assert form.log_change is None and not list(form.parameters())
    torch.testing.assert_close(form(x), before)
    torch.testing.assert_close(form.steps, torch.tensor([0.1, -0.2]).exp())


def test_an_input_is_rounded_once_and_only_in_layers_that_have_one():
    model = network(NETWORKS[0])
    for path in ("exit", "norm"):
        with pytest.raises(ValueError, match=path):
            quantize_input(model, path, 3, 4)


@pytest.mark.parametrize("harm", [{"bits": 5}, {"grids": 0}, {"grids": 4}])
def test_a_damaged_folder_is_refused(harm, tmp_path):
    save_model(network(NETWORKS[0]), tmp_path)
    forms = json.loads((tmp_path / FORMS).read_text())
    path = next(iter(forms))
    (tmp_path / FORMS).write_text(json.dumps(forms | {path: forms[path] | harm}))
    with pytest.raises(CorruptArtifact, match="whole"):
        load_network(tmp_path)
