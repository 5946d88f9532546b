"""Import of the published layout, with synthetic weights, against a forward pass of its own."""

import json
import math

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from safetensors.torch import save_file
from torch.nn.functional import conv2d, gelu, layer_norm, linear, scaled_dot_product_attention, silu
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ensemble.pipeline import PipelineError
from ensemble.pipelines.diffusion_pipeline import EnsembleDiffusionPipeline
from ensemble.pipelines.paris import convert_expert, convert_router, import_paris
from experts.conditions.condition import Condition
from experts.conditions.null_text import set_null_text
from experts.conditions.text_embedding import TextEmbedding
from experts.networks.registry import call_network

WIDTH, LAYERS, HEADS, PATCH, SIDE, TEXT, CHANNELS, EXPERTS = 32, 2, 4, 2, 8, 24, 4, 3
PATCHES = (SIDE // PATCH) ** 2


class Weights:
    """Random tensors under the names of the layout."""

    def __init__(self, seed):
        self.generator, self.tensors = torch.Generator().manual_seed(seed), {}

    def add(self, name, *shape):
        self.tensors[name] = torch.randn(*shape, generator=self.generator) * 0.1

    def layer(self, name, outputs, inputs):
        self.add(f"{name}.weight", outputs, inputs)
        self.add(f"{name}.bias", outputs)

    def attention(self, name):
        self.add(f"{name}.in_proj_weight", 3 * WIDTH, WIDTH)
        self.add(f"{name}.in_proj_bias", 3 * WIDTH)
        self.layer(f"{name}.out_proj", WIDTH, WIDTH)

    def trunk(self):
        self.add("patch_embed.weight", WIDTH, CHANNELS, PATCH, PATCH)
        self.add("patch_embed.bias", WIDTH)
        self.layer("time_embed.mlp.0", WIDTH, 256)
        self.layer("time_embed.mlp.2", WIDTH, WIDTH)
        for number in range(LAYERS):
            self.attention(f"layers.{number}.attn")
            self.layer(f"layers.{number}.mlp.0", 4 * WIDTH, WIDTH)
            self.layer(f"layers.{number}.mlp.2", WIDTH, 4 * WIDTH)


def expert_weights(seed=0):
    weights = Weights(seed)
    weights.trunk()
    weights.tensors["pos_embed"] = get_2d_sincos_pos_embed(WIDTH, 4, base_size=4, output_type="pt").float()[None]
    weights.layer("text_proj", WIDTH, TEXT)
    weights.layer("t_block.1", 6 * WIDTH, WIDTH)
    weights.layer("final_layer.linear", PATCH**2 * CHANNELS, WIDTH)
    weights.add("final_layer.scale_shift_table", 2, WIDTH)
    for number in range(LAYERS):
        weights.add(f"layers.{number}.scale_shift_table", 6, WIDTH)
        weights.attention(f"layers.{number}.cross_attn")
    return weights.tensors


def router_weights(seed=5):
    weights = Weights(seed)
    weights.trunk()
    weights.add("pos_embed", 1, PATCHES, WIDTH)
    weights.add("cls_token", 1, 1, WIDTH)
    for number in range(LAYERS):
        weights.layer(f"layers.{number}.adaLN_modulation.1", 6 * WIDTH, WIDTH)
    weights.layer("head.0", WIDTH, WIDTH)
    weights.add("head.2.weight", WIDTH)
    weights.add("head.2.bias", WIDTH)
    weights.layer("head.4", EXPERTS, WIDTH)
    return weights.tensors


class Reference:
    """The forward passes, written with functions alone."""

    def __init__(self, tensors):
        self.tensors = tensors

    def linear(self, name, inputs):
        return linear(inputs, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def attend(self, name, queries, keys):
        weights, biases = self.tensors[f"{name}.in_proj_weight"], self.tensors[f"{name}.in_proj_bias"]
        parts = [
            linear(inputs, weight, bias).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for inputs, weight, bias in zip((queries, keys, keys), weights.chunk(3), biases.chunk(3), strict=True)
        ]
        return self.linear(f"{name}.out_proj", scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))

    def start(self, noised, timesteps):
        frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
        angles = timesteps[:, None] * frequencies
        hidden = silu(self.linear("time_embed.mlp.0", torch.cat([angles.cos(), angles.sin()], 1)))
        patches = conv2d(noised, self.tensors["patch_embed.weight"], self.tensors["patch_embed.bias"], PATCH)
        return patches.flatten(2).mT + self.tensors["pos_embed"], self.linear("time_embed.mlp.2", hidden)

    def mlp(self, name, inputs):
        return self.linear(f"{name}.2", gelu(self.linear(f"{name}.0", inputs), approximate="tanh"))

    def expert(self, noised, timesteps, text):
        tokens, time = self.start(noised, timesteps)
        base = self.linear("t_block.1", silu(time)).view(len(noised), 6, WIDTH)
        text = self.linear("text_proj", text)
        for number in range(LAYERS):
            name = f"layers.{number}"
            chunks = (self.tensors[f"{name}.scale_shift_table"] + base).chunk(6, 1)
            normed = layer_norm(tokens, (WIDTH,)) * (1 + chunks[1]) + chunks[0]
            tokens = tokens + chunks[2] * self.attend(f"{name}.attn", normed, normed)
            tokens = tokens + self.attend(f"{name}.cross_attn", tokens, text)
            normed = layer_norm(tokens, (WIDTH,)) * (1 + chunks[4]) + chunks[3]
            tokens = tokens + chunks[5] * self.mlp(f"{name}.mlp", normed)
        shift, scale = (self.tensors["final_layer.scale_shift_table"] + time[:, None]).chunk(2, 1)
        output = self.linear("final_layer.linear", layer_norm(tokens, (WIDTH,)) * (1 + scale) + shift)
        squares = output.view(len(noised), 4, 4, PATCH, PATCH, CHANNELS).permute(0, 5, 1, 3, 2, 4)
        return squares.reshape(noised.shape)

    def router(self, noised, timesteps):
        tokens, time = self.start(noised, timesteps)
        tokens = torch.cat([self.tensors["cls_token"].expand(len(noised), -1, -1), tokens], 1)
        for number in range(LAYERS):
            name = f"layers.{number}"
            chunks = self.linear(f"{name}.adaLN_modulation.1", silu(time))[:, None].chunk(6, -1)
            normed = layer_norm(tokens, (WIDTH,)) * (1 + chunks[1]) + chunks[0]
            tokens = tokens + chunks[2] * self.attend(f"{name}.attn", normed, normed)
            normed = layer_norm(tokens, (WIDTH,)) * (1 + chunks[4]) + chunks[3]
            tokens = tokens + chunks[5] * self.mlp(f"{name}.mlp", normed)
        hidden = gelu(self.linear("head.0", tokens[:, 0]), approximate="tanh")
        normed = layer_norm(hidden, (WIDTH,), self.tensors["head.2.weight"], self.tensors["head.2.bias"])
        return self.linear("head.4", gelu(normed, approximate="tanh"))


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    noised, text = (
        torch.randn(3, CHANNELS, SIDE, SIDE, generator=generator),
        torch.randn(3, 7, TEXT, generator=generator),
    )
    return noised, torch.tensor([0.003, 0.5, 0.9985]), text


@torch.no_grad()
def test_expert_equals_the_reference(inputs):
    noised, t, sequence = inputs
    text = TextEmbedding(sequence, torch.ones(3, 7).bool(), torch.zeros(3, 0), torch.zeros(3).bool())
    network = set_null_text(convert_expert(expert_weights(), HEADS), text.rows(slice(1)))
    actual = call_network(network, noised, t, Condition(torch.full((3,), -1), text))
    expected = Reference(expert_weights()).expert(noised, 1000 * t, sequence)
    assert (actual - expected).abs().max() < 1e-5
    assert expected.abs().max() > 1


@torch.no_grad()
def test_router_equals_the_reference(inputs):
    noised, t, _ = inputs
    router = convert_router(router_weights(), HEADS)
    actual = router.logits(noised, t, Condition.null(3))
    expected = Reference(router_weights()).router(noised, 1000 * t)
    assert ((actual - expected) - (actual - expected)[:, :1]).abs().max() < 1e-5
    assert router.prior_counts.shape == (1, EXPERTS)
    assert router.prior_counts.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors: tensors | {"pos_embed": tensors["pos_embed"] + 0.01}, "table of sines"),
        (lambda tensors: tensors | {"layers.0.extra": torch.zeros(1)}, "no layers.0.extra"),
        (
            lambda tensors: {name: value for name, value in tensors.items() if name != "t_block.1.bias"},
            "t_block.1.bias",
        ),
        (lambda tensors: tensors | {"t_block.1.bias": torch.zeros(3)}, "size mismatch"),
    ],
)
def test_other_layouts_are_refused(change, reason):
    with pytest.raises(PipelineError, match=reason):
        convert_expert(change(expert_weights()), HEADS)


def test_router_of_another_layout_is_refused():
    with pytest.raises(PipelineError, match="router of Paris"):
        convert_router(router_weights() | {"text.weight": torch.zeros(1)}, HEADS)


@pytest.fixture
def paris(tmp_path):
    """A folder as it was published, with tiny synthetic weights."""
    for k in range(EXPERTS):
        (tmp_path / f"expert_{k}").mkdir()
        save_file(expert_weights(k), tmp_path / f"expert_{k}" / "diffusion_pytorch_model.safetensors")
        (tmp_path / f"expert_{k}" / "config.json").write_text(json.dumps({"num_heads": HEADS}))
    (tmp_path / "router").mkdir()
    save_file(router_weights(), tmp_path / "router" / "pytorch_model.safetensors")
    (tmp_path / "router" / "config.json").write_text(json.dumps({"num_heads": HEADS}))
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = AutoencoderKL(**blocks, block_out_channels=[8, 8], norm_num_groups=4, latent_channels=4)
    vae.save_pretrained(tmp_path / "vae")
    size = {"hidden_size": TEXT, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPTextModel(CLIPTextConfig(**size, vocab_size=6, max_position_embeddings=7)).save_pretrained(
        tmp_path / "text_encoder"
    )
    (tmp_path / "tokenizer").mkdir()
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "a": 3, "b": 4, "b</w>": 5}
    (tmp_path / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(
        str(tmp_path / "tokenizer" / "vocab.json"), str(tmp_path / "tokenizer" / "merges.txt")
    ).save_pretrained(tmp_path / "tokenizer")
    return tmp_path


def test_folder_samples_from_prompts(paris, tmp_path):
    pipe = import_paris(paris)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"seeds": [1, 2], "num_inference_steps": 2, "guidance_scale": 2.0}
    images = pipe(["a", "b"], **arguments, selection="top_k", output_type="np").images
    assert images.shape == (2, 16, 16, 3)
    sticky = pipe("a", **arguments | {"seeds": [1]})
    assert sticky.call_counts.router == 0
    other = pipe("b", **arguments | {"seeds": [1]})
    assert (sticky.latents - other.latents).abs().max() > 1e-4
    pipe.save_pretrained(tmp_path / "ours")
    again = EnsembleDiffusionPipeline.from_pretrained(tmp_path / "ours", text_encoder=pipe.text_encoder)
    again.set_progress_bar_config(disable=True)
    assert (again("a", **arguments | {"seeds": [1]}).latents - sticky.latents).abs().max() < 1e-3


def test_folder_with_code_is_refused(paris):
    (paris / "inference.py").write_text("raise SystemExit")
    with pytest.raises(PipelineError, match="code of a folder is never run"):
        import_paris(paris)
