"""LoRA on one, some or all experts: equal to merged weights, removable, and seen only where it was loaded."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from ensemble.pipeline_folder import PipelineError
from experts.networks.lora import AdapterError, read_lora
from experts.networks.registry import build_network
from tests.experts.networks.test_backbones import SHAPE as IMAGE_SHAPE
from tests.experts.networks.test_backbones import TINY, config_of, text

LAYERS = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn1.to_out.0", "proj_out_2")
ARGUMENTS = {"seeds": range(12), "class_labels": "a", "num_inference_steps": 3}


def lora_of(network, layers, rank=2, seed=0):
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name in layers:
        outputs, inputs = network.get_submodule(name).weight.shape
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator)
        tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator)
    return tensors


@pytest.fixture
def lora(pipe, tmp_path):
    save_file(lora_of(pipe.expert_0, LAYERS), tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


def parameters(pipe):
    return {
        f"{k}.{name}": value.clone()
        for k in range(3)
        for name, value in getattr(pipe, f"expert_{k}").state_dict().items()
    }


def test_adapters_equal_merged_weights(pipe, lora, tmp_path):
    other = lora_of(pipe.expert_0, LAYERS[1:], rank=3, seed=5)
    save_file(other, tmp_path / "other.safetensors")
    plain = pipe(**ARGUMENTS).latents
    pipe.load_lora_weights(lora, adapter_name="first", weight=0.5)
    pipe.load_lora_weights(tmp_path / "other.safetensors", adapter_name="second", weight=2.0)
    actual = pipe(**ARGUMENTS).latents
    pipe.set_adapters(["first"], [0.25])
    weighted = pipe(**ARGUMENTS).latents
    pipe.unload_lora_weights()
    for factors, weight in ((lora_of(pipe.expert_0, LAYERS), 0.5), (other, 2.0)):
        merge(pipe, factors, weight)
    merged = pipe(**ARGUMENTS).latents
    assert (actual - merged).abs().max() < 1e-5 * merged.abs().max()
    assert (actual - plain).abs().max() > 0.1
    merge(pipe, other, -2.0)
    merge(pipe, lora_of(pipe.expert_0, LAYERS), -0.25)
    assert (weighted - pipe(**ARGUMENTS).latents).abs().max() < 1e-5 * merged.abs().max()


@torch.no_grad()
def merge(pipe, factors, weight):
    for name in {key.removeprefix("transformer.").rsplit(".lora_", 1)[0] for key in factors}:
        change = factors[f"transformer.{name}.lora_B.weight"] @ factors[f"transformer.{name}.lora_A.weight"]
        for k in range(3):
            getattr(pipe, f"expert_{k}").get_submodule(name).weight.add_(weight * change)


def test_unloading_restores_bytes_and_output(pipe, lora):
    before, plain = parameters(pipe), pipe(**ARGUMENTS).latents
    modules = [type(module) for module in pipe.expert_1.modules()]
    pipe.load_lora_weights(lora)
    assert not torch.equal(pipe(**ARGUMENTS).latents, plain)
    pipe.unload_lora_weights()
    after = parameters(pipe)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert modules == [type(module) for module in pipe.expert_1.modules()]
    assert torch.equal(pipe(**ARGUMENTS).latents, plain)


def test_adapter_of_one_expert_changes_its_samples_only(pipe, lora):
    gates = []
    keep = {"callback_on_step_end": lambda *_, **__: gates.append(_[3]["gates"]) or {}}
    plain = pipe(**ARGUMENTS, **keep, callback_on_step_end_tensor_inputs=["gates"]).latents
    pipe.load_lora_weights(lora, experts=[2])
    changed = (pipe(**ARGUMENTS).latents - plain).abs().flatten(1).amax(1) > 0
    routed = gates[0].argmax(1) == 2
    assert 0 < int(routed.sum()) < 12
    assert torch.equal(changed, routed)


@pytest.mark.parametrize("case", TINY)
def test_adapter_loads_into_every_class(case, pipe, tmp_path):
    condition = text(1) if "DiT" not in case and case != "UNet2DModel" else None
    network = build_network(config_of(case), IMAGE_SHAPE, 0 if condition else 2, condition)
    names = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)][:3]
    save_file(lora_of(network, names), tmp_path / "lora.safetensors")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    pipe.register_modules(expert_0=network)
    pipe.load_lora_weights(tmp_path / "lora.safetensors", experts=[0])
    assert any("lora_A" in name for name in network.state_dict())
    pipe.unload_lora_weights()
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in before.items())


def test_adapter_of_peft_is_read(pipe, tmp_path):
    torch.manual_seed(0)
    target = ["to_q", "to_k"]
    wrapped = get_peft_model(
        build_network(config_of("DiTTransformer2DModel"), IMAGE_SHAPE, 2),
        LoraConfig(r=2, lora_alpha=8, target_modules=target),
    )
    wrapped.save_pretrained(tmp_path / "peft")
    lora = read_lora(tmp_path / "peft")
    assert {weights.alpha for weights in lora.values()} == {8.0}
    assert "transformer_blocks.1.attn1.to_k" in lora


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors: {}, "must hold lora_A and lora_B"),
        (lambda tensors: tensors | {"transformer.x.bias": torch.zeros(1)}, "no factor of a LoRA"),
        (
            lambda tensors: (
                tensors | {"proj_9.lora_A.weight": torch.zeros(1, 2), "proj_9.lora_B.weight": torch.zeros(2, 1)}
            ),
            "proj_9 of adapter",
        ),
        (lambda tensors: {name: value[..., :1].contiguous() for name, value in tensors.items()}, "weights of shape"),
    ],
)
def test_unfit_adapter_is_refused_and_changes_nothing(change, reason, pipe, tmp_path):
    save_file(change(lora_of(pipe.expert_0, LAYERS)), tmp_path / "lora.safetensors")
    before = parameters(pipe)
    with pytest.raises(AdapterError, match=reason):
        pipe.load_lora_weights(tmp_path / "lora.safetensors")
    assert before.keys() == parameters(pipe).keys()


def test_fusing_and_saving_with_adapters_are_refused(pipe, lora, tmp_path):
    pipe.load_lora_weights(lora)
    with pytest.raises(PipelineError, match="fusing rounds"):
        pipe.fuse_lora()
    with pytest.raises(PipelineError, match="unload_lora_weights"):
        pipe.save_pretrained(tmp_path / "out")
    with pytest.raises(AdapterError, match="has an adapter 'default'"):
        pipe.load_lora_weights(lora)
    with pytest.raises(PipelineError, match="no expert 7"):
        pipe.load_lora_weights(lora, experts=[7], adapter_name="other")
    torch.save({}, tmp_path / "lora.bin")
    with pytest.raises(AdapterError, match="must be a safetensors file"):
        pipe.load_lora_weights(tmp_path / "lora.bin")
