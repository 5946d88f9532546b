"""Every class of network at a tiny size: what an expert needs of it holds for all of them."""

import inspect

import pytest
import torch

from experts.conditions.condition import Condition
from experts.conditions.text_embedding import TextEmbedding
from experts.config import DiffusersConfig
from experts.networks.adapters.registry import ADAPTERS
from experts.networks.class_settings import NetworkError, default_settings
from experts.networks.latent_shapes import check_condition, check_latent_shape
from experts.networks.model_io import save_model
from experts.networks.registry import (
    build_network,
    call_network,
    enable_gradient_checkpointing,
    load_network,
    pack_latents,
    unpack_latents,
)

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
SINGLE = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "num_single_layers": 1}
LEVELS = {"block_out_channels": [16, 32], "norm_num_groups": 8}
CROSS = {
    **LEVELS,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 4,
}
TINY = {
    "UNet2DModel": {
        **LEVELS,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
    },
    "DiTTransformer2DModel": HEADS,
    "UNet2DConditionModel": CROSS,
    "UNet2DConditionModel/sdxl": {
        **CROSS,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "use_linear_projection": True,
    },
    "PixArtTransformer2DModel": {**HEADS, "cross_attention_dim": 32},
    "SanaTransformer2DModel": {
        **HEADS,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 32,
    },
    "SD3Transformer2DModel": {**HEADS, "caption_projection_dim": 32, "qk_norm": "rms_norm"},
    "FluxTransformer2DModel": {**SINGLE, "axes_dims_rope": [4, 6, 6]},
    "Lumina2Transformer2DModel": {
        "hidden_size": 48,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "multiple_of": 8,
        "axes_dim_rope": [8, 8, 8],
        "axes_lens": [64, 32, 32],
    },
    "PRXTransformer2DModel": {"hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "axes_dim": [8, 8]},
    "PRXTransformer2DModel/pixels": {
        "hidden_size": 32,
        "mlp_ratio": 2.0,
        "num_heads": 2,
        "depth": 2,
        "axes_dim": [8, 8],
        "patch_size": 4,
        "bottleneck_size": 8,
    },
    "QwenImageTransformer2DModel": {**HEADS, "axes_dims_rope": [4, 6, 6]},
    "ZImageTransformer2DModel": {
        "dim": 48,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "axes_dims": [8, 8, 8],
        "axes_lens": [64, 32, 32],
    },
    "AuraFlowTransformer2DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_mmdit_layers": 1,
        "num_single_dit_layers": 1,
        "caption_projection_dim": 32,
        "pos_embed_max_size": 64,
    },
    "ChromaTransformer2DModel": {
        **SINGLE,
        "axes_dims_rope": [4, 6, 6],
        "approximator_num_channels": 16,
        "approximator_hidden_dim": 32,
        "approximator_layers": 1,
    },
    "CogView4Transformer2DModel": {**HEADS, "time_embed_dim": 16, "condition_dim": 8, "rope_axes_dim": [8, 8]},
}
SHAPE, TOKENS, WIDTH, POOLED = (4, 8, 8), 7, 24, 20


def config_of(case):
    return DiffusersConfig(class_name=case.partition("/")[0], settings=TINY[case])


def text(rows, seed=1, tokens=TOKENS):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([tokens, 4, 1])[:rows]
    return TextEmbedding(
        torch.randn(rows, tokens, WIDTH, generator=generator),
        torch.arange(tokens) < lengths[:, None],
        torch.randn(rows, POOLED, generator=generator),
        torch.zeros(rows, dtype=torch.bool),
    )


def reads_text(case):
    return ADAPTERS[config_of(case).class_name].reads_text


def build(case):
    """Return a network without zero-initialized layers, so that every input matters."""
    torch.manual_seed(0)
    config = config_of(case)
    classes = 0 if reads_text(case) else 3
    model = build_network(config, SHAPE, classes, text(1, seed=5) if reads_text(case) else None)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def inputs(case, shape=SHAPE):
    generator = torch.Generator().manual_seed(3)
    with_text = Condition(torch.full((3,), -1), text(3))
    condition = with_text if reads_text(case) else Condition(torch.tensor([0, 2, -1]))
    return torch.randn(3, *shape, generator=generator), torch.tensor([0.1, 0.5, 0.9]), condition


def gradients(model, case):
    model.train()
    torch.manual_seed(0)
    call_network(model, *inputs(case)).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


each_case = pytest.mark.parametrize("case", TINY)


def test_every_class_has_a_tiny_size():
    assert {case.partition("/")[0] for case in TINY} == ADAPTERS.keys() - {"ResidualMLP"}


@each_case
def test_every_parameter_has_a_gradient(case):
    missing = {name for name, gradient in gradients(build(case), case).items() if gradient is None}
    assert missing == UNUSED.get(case, set())


UNUSED = {
    "QwenImageTransformer2DModel": {
        f"transformer_blocks.1.{name}"
        for name in (
            "attn.to_add_out.weight",
            "attn.to_add_out.bias",
            "txt_mlp.net.0.proj.weight",
            "txt_mlp.net.0.proj.bias",
            "txt_mlp.net.2.weight",
            "txt_mlp.net.2.bias",
        )
    }
}
"""The last block of QwenImage computes a text that nothing reads."""


@each_case
def test_loaded_network_equals_saved_network(case, tmp_path):
    model = build(case)
    save_model(model, tmp_path)
    loaded = load_network(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    with torch.no_grad():
        assert torch.equal(call_network(model, *inputs(case)), call_network(loaded, *inputs(case)))


@each_case
def test_a_row_alone_equals_the_row_in_a_batch(case):
    model, (noised, t, condition) = build(case), inputs(case)
    with torch.no_grad():
        together = call_network(model, noised, t, condition)
        for row in range(3):
            index = torch.tensor([row])
            alone = call_network(model, noised[index], t[index], condition.rows(index))
            assert alone.shape == (1, *SHAPE)
            torch.testing.assert_close(alone, together[index], atol=5e-6, rtol=5e-6)


@each_case
def test_prediction_depends_on_t_and_condition(case):
    model, (noised, t, condition) = build(case), inputs(case)
    with torch.no_grad():
        base = call_network(model, noised, t, condition)
        assert not torch.allclose(base, call_network(model, noised, 1 - t, condition))
        assert not torch.allclose(base, call_network(model, noised, t, Condition.null(3)), atol=1e-6)


@each_case
def test_padding_is_read_only_by_the_classes_that_admit_it(case):
    if not reads_text(case):
        return
    model, (noised, t, condition) = build(case), inputs(case)
    padding = ~condition.text.mask[..., None]
    sequence = torch.where(padding, 100.0, condition.text.sequence)
    junk = TextEmbedding(sequence, condition.text.mask, condition.text.pooled, condition.text.is_null)
    with torch.no_grad():
        base = call_network(model, noised, t, condition)
        changed = call_network(model, noised, t, Condition(condition.class_id, junk))
    assert torch.allclose(base, changed, atol=1e-6) is not ADAPTERS[config_of(case).class_name].reads_padding


@each_case
def test_another_text_length_is_an_error(case):
    model, (noised, t, condition) = build(case), inputs(case)
    with pytest.raises(ValueError, match="pad the text to its length|without text"):
        call_network(model, noised, t, Condition(condition.class_id, text(3, tokens=9)))


@each_case
def test_checkpointing_equals_plain_or_is_refused(case):
    plain, checkpointed = build(case), build(case)
    if ADAPTERS[config_of(case).class_name].checkpointing_fault:
        with pytest.raises(NetworkError, match="ChromaTransformer2DModel .* drops the attention mask"):
            enable_gradient_checkpointing(checkpointed)
        return
    enable_gradient_checkpointing(checkpointed)
    expected, actual = gradients(plain, case), gradients(checkpointed, case)
    for name, gradient in expected.items():
        assert gradient is actual[name] or torch.equal(gradient, actual[name]), name


@each_case
def test_latents_may_have_any_sides_that_fit(case):
    if ADAPTERS[config_of(case).class_name].is_square:
        return
    model, (noised, t, condition) = build(case), inputs(case, (4, 8, 12))
    with torch.no_grad():
        assert call_network(model, noised, t, condition).shape == noised.shape


@each_case
def test_abilities_are_those_of_the_class(case):
    model, adapter = build(case), ADAPTERS[config_of(case).class_name]
    assert hasattr(model, "add_adapter") is adapter.has_lora
    processors = [module.processor for module in model.modules() if hasattr(module, "processor")]
    assert any(hasattr(processor, "_attention_backend") for processor in processors) is adapter.has_attention_backends


def test_defaults_are_read_without_importing_the_class():
    for adapter in ADAPTERS.values():
        signature = inspect.signature(adapter.model_class()).parameters
        expected = {
            name: None if parameter.default is parameter.empty else parameter.default
            for name, parameter in signature.items()
        }
        assert default_settings(adapter) == expected


def test_packing_is_that_of_flux():
    latents = torch.arange(4 * 4 * 6.0).reshape(1, 4, 4, 6)
    tokens = latents.view(1, 4, 2, 2, 3, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 6, 16)
    assert torch.equal(pack_latents(latents), tokens)
    assert torch.equal(unpack_latents(tokens, (2, 3)), latents)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DiffusersConfig(class_name="SD3Transformer2D"), "did you mean SD3Transformer2DModel"),
        (DiffusersConfig(class_name="PixArtTransformer2DModel", settings={"num_layer": 2}), "did you mean num_layers"),
        (DiffusersConfig(class_name="SanaTransformer2DModel", settings={"in_channels": 2}), "follow from the data"),
        (DiffusersConfig(class_name="PRXTransformer2DModel", settings={"patch_size": 3}), "does not divide 8"),
    ],
)
def test_wrong_settings_are_refused(config, message):
    with pytest.raises(NetworkError, match=message):
        check_latent_shape(config, SHAPE)


@pytest.mark.parametrize(
    ("case", "classes", "text_shape", "message"),
    [
        ("SD3Transformer2DModel", 0, None, "needs a text"),
        ("SD3Transformer2DModel", 3, (7, 24, 20), "no classes; set data.labels=false"),
        ("FluxTransformer2DModel", 0, (7, 24, 0), "needs the pooled vector"),
        ("UNet2DConditionModel/sdxl", 0, (7, 24, 0), "needs the pooled vector"),
        ("DiTTransformer2DModel", 3, (7, 24, 20), "reads classes and no text"),
    ],
)
def test_conditions_that_a_network_cannot_read_are_refused(case, classes, text_shape, message):
    with pytest.raises(NetworkError, match=message):
        check_condition(config_of(case), classes, text_shape)
