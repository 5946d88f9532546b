"""Timestep-aware activation quantization: the nearest grid a row, and candidate recorder a network."""

import copy
import json

import pytest
import torch
from torch import nn

from ddm_core.artifacts import CorruptArtifact
from experts.compressed.conditional.timestep_recorder import TimestepRecorder
from experts.compressed.quantization.activation_quant import TimestepActivationQuantizer, quantize_input
from experts.compressed.quantization.packed_weight import pack_weight
from experts.compressed.quantization.packing import Packing
from experts.conditions.condition import Condition
from experts.config import DiTConfig, ResidualMLPConfig, UNetConfig
from experts.networks.model_io import QUANTIZATION_CONFIG, save_model
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
    layers = [path for path, entry in model.named_modules() if isinstance(entry, nn.Linear | nn.Conv2d)]
    for path in layers:
        layer = model.get_submodule(path)
        channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        quantizer = quantize_input(model, path, 3, bits, channels)
        steps = torch.tensor([0.1, 0.3, 0.6])[:, None] * torch.linspace(1, 1.5, channels)
        grids = (steps, torch.full_like(steps, 2 ** (bits - 1)))
        quantizer.set_grids(unit * torch.tensor([0.1, 0.5, 0.9]), grids)
    return model


def predict(model, t, rows=5):
    noised = torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return call_network(model, noised, t, Condition.null(rows))


def test_rows_use_the_grid_of_the_nearest_timestep():
    recorder = TimestepRecorder()
    quantizer = TimestepActivationQuantizer(recorder, 2, 4)
    quantizer.set_grids(torch.tensor([0.2, 0.8]), (torch.tensor([[1.0], [0.5]]), torch.tensor([[8.0], [0.0]])))
    recorder.timestep = torch.tensor([0.0, 0.49, 0.51, 3.0])
    x = torch.tensor([-1.3, 0.7, 9.0]).expand(4, 2, 3)
    rounded = quantizer(x)[:, 0].tolist()
    assert rounded == [[-1.0, 1.0, 7.0]] * 2 + [[0.0, 0.5, 7.5]] * 2


@pytest.mark.parametrize("layer", [nn.Linear(3, 2), nn.Conv2d(3, 2, 1)])
def test_each_channel_has_its_own_grid(layer):
    model = nn.Sequential(layer)
    quantizer = quantize_input(model, "0", 1, 4, 3)
    quantizer.set_grids(torch.zeros(1), (torch.tensor([[1.0, 0.5, 0.125]]), torch.tensor([[8.0, 8.0, 0.0]])))
    x = torch.tensor([-1.3, 0.7, 9.0])
    quantizer.recorder.timestep = torch.zeros(1)
    rounded = torch.tensor([-1.0, 0.5, 1.875])
    shape = (1, 3) if isinstance(layer, nn.Linear) else (1, 3, 1, 1)
    assert torch.equal(quantizer(x.reshape(shape)), rounded.reshape(shape))


def test_layer_called_without_network_raises():
    with pytest.raises(RuntimeError, match="call the whole network"):
        TimestepActivationQuantizer(TimestepRecorder(), 2, 4)(torch.zeros(3, 2))


@pytest.mark.parametrize("config", NETWORKS, ids=lambda config: config.kind)
def test_rows_with_different_t_are_independent(config):
    model, t = network(config, 8), torch.tensor([0.0, 0.2, 0.5, 0.7, 1.0])
    together = predict(model, t)
    noised = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(1))
    for row in range(5):
        with torch.no_grad():
            alone = call_network(model, noised[row : row + 1], t[row : row + 1], Condition.null(1))
        error = (alone[0] - together[row]).norm() / together[row].norm()
        assert error < 0.05
    assert not torch.equal(predict(model, torch.tensor(0.1)), predict(model, torch.tensor(0.9)))


@pytest.mark.parametrize("config", NETWORKS, ids=lambda config: config.kind)
def test_quantized_network_saves_and_copies_bit_for_bit(config, tmp_path):
    model, t = network(config), torch.rand(5, generator=torch.Generator().manual_seed(2))
    for name in [name for name, weight in model.named_parameters() if weight.ndim > 1]:
        packing = Packing(bits=4, group_size=16, shape=tuple(model.get_parameter(name).shape))
        pack_weight(model, name, packing)
    save_model(model, tmp_path / "a")
    save_model(load_network(tmp_path / "a"), tmp_path / "b")
    assert torch.equal(predict(load_network(tmp_path / "b"), t), predict(model, t))
    twin = copy.deepcopy(model)
    assert torch.equal(predict(twin, t), predict(model, t))
    predict(twin, torch.tensor(0.9))
    recorders = [
        {quantizer.recorder for quantizer in candidate.modules() if isinstance(quantizer, TimestepActivationQuantizer)}
        for candidate in (model, twin)
    ]
    assert [len(entry) for entry in recorders] == [1, 1] and not recorders[0] & recorders[1]
    assert torch.equal(recorders[0].pop().timestep, t if config.kind == "residual_mlp" else t * 1000)


def test_freeze_keeps_learned_step_sizes():
    quantizer = TimestepActivationQuantizer(TimestepRecorder(), 2, 4)
    quantizer.recorder.timestep = torch.tensor([0.0])
    quantizer.make_learnable()
    quantizer.log_change.data.copy_(torch.tensor([[0.01], [-0.02]]))
    x = torch.linspace(-1, 1, 9)[None]
    before = quantizer(x)
    quantizer.freeze()
    assert quantizer.log_change is None and not list(quantizer.parameters())
    torch.testing.assert_close(quantizer(x), before, rtol=1e-3, atol=0)
    torch.testing.assert_close(quantizer.steps, torch.tensor([[0.1], [-0.2]]).exp().half())


def test_quantizer_is_refused_twice_or_without_a_weight():
    model = network(NETWORKS[0])
    for path in ("exit", "norm"):
        with pytest.raises(ValueError, match=path):
            quantize_input(model, path, 3, 4)


@pytest.mark.parametrize("change", [{"bits": 5}, {"grids": 0}, {"grids": 4}, {"channels": 2}])
def test_damaged_folder_is_refused(change, tmp_path):
    save_model(network(NETWORKS[0]), tmp_path)
    config = json.loads((tmp_path / QUANTIZATION_CONFIG).read_text())
    path = next(iter(config))
    (tmp_path / QUANTIZATION_CONFIG).write_text(json.dumps(config | {path: config[path] | change}))
    with pytest.raises(CorruptArtifact, match="complete"):
        load_network(tmp_path)
