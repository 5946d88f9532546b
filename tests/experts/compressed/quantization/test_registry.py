"""Quantized networks: accuracy, size, and folders."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrize

from ddm_core.artifacts import CorruptArtifact
from experts.compressed.quantization import int8_linear
from experts.compressed.quantization.int8_linear import Int8Linear, computes_in_int8
from experts.compressed.quantization.packed_weight import pack_weight
from experts.compressed.quantization.packing import Packing, pack, unpack
from experts.compressed.quantization.registry import quantized_modules
from experts.conditions.condition import Condition
from experts.config import DiTConfig, ResidualMLPConfig, UNetConfig
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from experts.networks.model_io import QUANTIZATION_CONFIG, load_model, save_model
from experts.networks.registry import build_network, call_network, load_network
from experts.training.flops import forward_flops

SHAPE = (1, 8, 8)
NETWORKS = (
    ResidualMLPConfig(width=32, depth=1),
    UNetConfig(channels=(8, 16), layers_per_block=1),
    DiTConfig(patch_size=4, heads=2, head_width=16, depth=1),
)
FILE = "diffusion_pytorch_model.safetensors"


def network(config):
    torch.manual_seed(0)
    model = build_network(config, SHAPE, 3).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def pack_large_weights(model, bits=4, min_elements=256):
    names = [name for name, weight in model.named_parameters() if weight.ndim > 1 and weight.numel() >= min_elements]
    for name in names:
        pack_weight(model, name, Packing(bits=bits, group_size=32, shape=tuple(model.get_parameter(name).shape)))
    return names


def predict(model, rows=5):
    generator = torch.Generator().manual_seed(1)
    noised, t = torch.randn(rows, *SHAPE, generator=generator), torch.rand(rows, generator=generator)
    with torch.no_grad():
        return call_network(model, noised, t, Condition.null(rows))


@pytest.mark.parametrize("config", NETWORKS, ids=lambda config: config.kind)
def test_packed_network_equals_rounded_network_after_saving(config, tmp_path):
    model = network(config)
    rounded, small = copy.deepcopy(model), model
    original_bytes = sum(value.nbytes for value in model.state_dict().values())
    for name in pack_large_weights(small):
        weight = rounded.get_parameter(name)
        packing = Packing(bits=4, group_size=32, shape=tuple(weight.shape))
        weight.data.copy_(unpack(*pack(weight, packing), packing))
    assert torch.equal(predict(small), predict(rounded))
    assert sum(value.nbytes for value in small.state_dict().values()) < 0.5 * original_bytes
    save_model(small, tmp_path / "a")
    save_model(load_network(tmp_path / "a"), tmp_path / "b")
    assert torch.equal(predict(load_network(tmp_path / "b")), predict(rounded))
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()
    with parametrize.cached():
        assert torch.equal(predict(small), predict(rounded))


@pytest.mark.parametrize("harm", ["scales", "kind", "bits", "shape", "list", "unknown"])
def test_damaged_folder_is_refused(harm, tmp_path):
    model = network(NETWORKS[0])
    pack_large_weights(model)
    save_model(model, tmp_path)
    tensors, config = load_file(tmp_path / FILE), json.loads((tmp_path / QUANTIZATION_CONFIG).read_text())
    path = next(iter(config))
    if harm == "scales":
        del tensors[f"{path}.scales"]
        save_file(tensors, tmp_path / FILE)
    changed = {
        "scales": config,
        "kind": {key: value for key, value in config.items() if key != path},
        "bits": config | {path: config[path] | {"bits": 7}},
        "shape": config | {path: config[path] | {"shape": [7, 7]}},
        "list": [],
        "unknown": config | {path: config[path] | {"kind": "magic"}},
    }[harm]
    (tmp_path / QUANTIZATION_CONFIG).write_text(json.dumps(changed))
    with pytest.raises(CorruptArtifact, match="complete"):
        load_network(tmp_path)


def int8(linear, bits=8):
    packing = Packing(bits=bits, group_size=linear.in_features, shape=tuple(linear.weight.shape))
    return Int8Linear.from_linear(linear, packing)


@pytest.mark.parametrize(("inside", "out", "bias"), [(32, 64, True), (64, 10, False), (384, 96, True)])
def test_int8_layer_is_accurate_and_rows_are_independent(inside, out, bias):
    torch.manual_seed(0)
    linear, rows = torch.nn.Linear(inside, out, bias=bias), torch.randn(3, 50, inside)
    rows[0] *= 1000
    layer = int8(linear)
    exact, close = linear(rows), layer(rows)
    assert close.shape == exact.shape
    error = torch.linalg.vector_norm(close - exact, dim=-1) / torch.linalg.vector_norm(exact, dim=-1)
    assert error.mean() < 0.012 and error.max() < 0.05
    assert torch.equal(layer(rows[1:2, :1]), close[1:2, :1])
    assert not int8(linear)(torch.zeros(2, inside)).sub(linear(torch.zeros(2, inside))).any()


def test_int8_layer_equals_exact_integer_product():
    torch.manual_seed(0)
    linear, rows = torch.nn.Linear(64, 16), torch.randn(40, 64)
    layer = int8(linear)
    scales = rows.abs().amax(1, keepdim=True) / 127
    weight = unpack(layer.codes, layer.scales, layer.packing)
    steps = weight.abs().amax(1) / 127
    products = (rows / scales).round().double() @ (weight / steps[:, None]).round().double().T
    torch.testing.assert_close(layer(rows).double(), products * scales * steps + linear.bias, rtol=1e-4, atol=1e-4)


def test_largest_int8_products_do_not_overflow():
    linear = torch.nn.Linear(384, 4, bias=False).requires_grad_(False)
    linear.weight.fill_(0.5)
    rows = torch.tensor([1.0, -1.0, 0.9]).repeat_interleave(384).reshape(3, 384)
    torch.testing.assert_close(int8(linear)(rows), linear(rows), rtol=1e-3, atol=0)


@pytest.mark.parametrize("has_instructions", [True, False])
def test_int8_product_is_exact_with_and_without_vnni(has_instructions, monkeypatch):
    if has_instructions and not computes_in_int8():
        pytest.skip("this processor has none")
    monkeypatch.setattr(int8_linear, "computes_in_int8", lambda: has_instructions)
    torch.manual_seed(0)
    weight, rows = torch.randint(-127, 128, (16, 64)).float(), torch.randint(-127, 128, (40, 64)).float()
    weight[:, 0], rows[:, 0] = 127, 127
    linear = torch.nn.Linear(64, 16, bias=False).requires_grad_(False)
    linear.weight.copy_(weight)
    assert torch.equal(int8(linear)(rows), (rows.long() @ weight.long().T).float())


def test_int8_transformer_can_be_saved_loaded_and_copied(tmp_path):
    model = network(NETWORKS[2])
    exact, flops = predict(model), forward_flops(lambda: predict(model))
    for path, layer in [item for item in model.named_modules() if type(item[1]) is torch.nn.Linear]:
        model.set_submodule(path, int8(layer, bits=4))
    assert forward_flops(lambda: predict(model)) == flops
    assert 0 < (predict(model) - exact).norm() / exact.norm() < 0.3
    expert = Expert(
        model=model,
        prediction="velocity",
        noise_schedule=RECTIFIED_FLOW,
        latent_shape=SHAPE,
        num_classes=3,
        cluster_id=0,
    )
    expert.save(tmp_path)
    assert torch.equal(predict(Expert.load(tmp_path).model), predict(model))
    assert torch.equal(predict(copy.deepcopy(model)), predict(model))
    assert len(quantized_modules(model)) == sum(isinstance(layer, Int8Linear) for layer in model.modules())


def test_quantized_module_of_wrong_shape_is_refused(tmp_path):
    model = network(NETWORKS[0])
    save_model(model, tmp_path)
    settings = int8(torch.nn.Linear(8, 8)).settings()
    path = next(path for path, layer in model.named_modules() if type(layer) is torch.nn.Linear)
    (tmp_path / QUANTIZATION_CONFIG).write_text(json.dumps({path: {"kind": "int8_linear"} | settings}))
    with pytest.raises(CorruptArtifact, match="no linear layer of shape"):
        load_model((type(model),), tmp_path)
