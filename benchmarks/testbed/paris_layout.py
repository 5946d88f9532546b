"""The published layout of Paris with tiny random weights, and its forward passes in functions of torch."""

import json
import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, linear, scaled_dot_product_attention, silu
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WIDTH, LAYERS, HEADS, PATCH, SIDE, TEXT, CHANNELS, EXPERTS = 32, 2, 4, 2, 8, 24, 4, 3
GRID = SIDE // PATCH


class RandomTensors:
    """Random tensors under the names of the layout."""

    def __init__(self, seed: int) -> None:
        """Start without tensors."""
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, Tensor] = {}

    def add(self, name: str, *shape: int) -> None:
        """Add one tensor."""
        self.tensors[name] = torch.randn(*shape, generator=self.generator) * 0.1

    def layer(self, name: str, outputs: int, inputs: int) -> None:
        """Add weight and bias of a linear layer."""
        self.add(f"{name}.weight", outputs, inputs)
        self.add(f"{name}.bias", outputs)

    def attention(self, name: str) -> None:
        """Add a layer of attention."""
        self.add(f"{name}.in_proj_weight", 3 * WIDTH, WIDTH)
        self.add(f"{name}.in_proj_bias", 3 * WIDTH)
        self.layer(f"{name}.out_proj", WIDTH, WIDTH)

    def trunk(self) -> None:
        """Add what experts and router both have."""
        self.add("patch_embed.weight", WIDTH, CHANNELS, PATCH, PATCH)
        self.add("patch_embed.bias", WIDTH)
        self.layer("time_embed.mlp.0", WIDTH, 256)
        self.layer("time_embed.mlp.2", WIDTH, WIDTH)
        for number in range(LAYERS):
            self.attention(f"layers.{number}.attn")
            self.layer(f"layers.{number}.mlp.0", 4 * WIDTH, WIDTH)
            self.layer(f"layers.{number}.mlp.2", WIDTH, 4 * WIDTH)


def sine_table() -> Tensor:
    """Return the positions, (patch, width): sines and cosines of the column, then of the row."""
    frequencies = 10000.0 ** -(torch.arange(WIDTH // 4, dtype=torch.float64) / (WIDTH // 4))
    rows, columns = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    parts = [axis.flatten()[:, None] * frequencies for axis in (columns, rows)]
    return torch.cat([function(part) for part in parts for function in (torch.sin, torch.cos)], 1).float()


def expert_weights(seed: int = 0) -> dict[str, Tensor]:
    """Return the tensors of an expert."""
    weights = RandomTensors(seed)
    weights.trunk()
    weights.tensors["pos_embed"] = sine_table()[None]
    weights.layer("text_proj", WIDTH, TEXT)
    weights.layer("t_block.1", 6 * WIDTH, WIDTH)
    weights.layer("final_layer.linear", PATCH**2 * CHANNELS, WIDTH)
    weights.add("final_layer.scale_shift_table", 2, WIDTH)
    for number in range(LAYERS):
        weights.add(f"layers.{number}.scale_shift_table", 6, WIDTH)
        weights.attention(f"layers.{number}.cross_attn")
    return weights.tensors


def router_weights(seed: int = 5) -> dict[str, Tensor]:
    """Return the tensors of the router."""
    weights = RandomTensors(seed)
    weights.trunk()
    weights.add("pos_embed", 1, GRID**2, WIDTH)
    weights.add("cls_token", 1, 1, WIDTH)
    for number in range(LAYERS):
        weights.layer(f"layers.{number}.adaLN_modulation.1", 6 * WIDTH, WIDTH)
    weights.layer("head.0", WIDTH, WIDTH)
    weights.add("head.2.weight", WIDTH)
    weights.add("head.2.bias", WIDTH)
    weights.layer("head.4", EXPERTS, WIDTH)
    return weights.tensors


class ParisReference:
    """The forward passes of the layout; they import nothing of ours."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        """Keep the tensors of an expert or the router."""
        self.tensors = tensors

    def linear(self, name: str, inputs: Tensor) -> Tensor:
        """Apply a linear layer."""
        return linear(inputs, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def attend(self, name: str, queries: Tensor, keys: Tensor) -> Tensor:
        """Apply a layer of attention."""
        weights, biases = self.tensors[f"{name}.in_proj_weight"], self.tensors[f"{name}.in_proj_bias"]
        query, key, value = (
            linear(inputs, weight, bias).view(*inputs.shape[:2], HEADS, -1).transpose(1, 2)
            for inputs, weight, bias in zip((queries, keys, keys), weights.chunk(3), biases.chunk(3), strict=True)
        )
        return self.linear(
            f"{name}.out_proj", scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        )

    def start(self, noised: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens of the patches, and the embedded timesteps."""
        frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
        angles = timesteps[:, None] * frequencies
        hidden = silu(self.linear("time_embed.mlp.0", torch.cat([angles.cos(), angles.sin()], 1)))
        patches = conv2d(noised, self.tensors["patch_embed.weight"], self.tensors["patch_embed.bias"], PATCH)
        return patches.flatten(2).mT + self.tensors["pos_embed"], self.linear("time_embed.mlp.2", hidden)

    def mlp(self, name: str, inputs: Tensor) -> Tensor:
        """Apply the two layers after attention."""
        return self.linear(f"{name}.2", gelu(self.linear(f"{name}.0", inputs), approximate="tanh"))

    def velocity(self, noised: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """Return what an expert predicts; timesteps go from 0 to 1,000."""
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
        squares = output.view(len(noised), GRID, GRID, PATCH, PATCH, CHANNELS).permute(0, 5, 1, 3, 2, 4)
        return squares.reshape(noised.shape)

    def logits(self, noised: Tensor, timesteps: Tensor) -> Tensor:
        """Return the logits of the router."""
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


def write_paris(folder: Path) -> Path:
    """Write a folder as it was published, with tiny random weights, and return it."""
    for k in range(EXPERTS):
        (folder / f"expert_{k}").mkdir(parents=True)
        save_file(expert_weights(k), folder / f"expert_{k}" / "diffusion_pytorch_model.safetensors")
        (folder / f"expert_{k}" / "config.json").write_text(json.dumps({"num_heads": HEADS}))
    (folder / "router").mkdir()
    save_file(router_weights(), folder / "router" / "pytorch_model.safetensors")
    (folder / "router" / "config.json").write_text(json.dumps({"num_heads": HEADS}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            latent_channels=CHANNELS,
        ).save_pretrained(folder / "vae")
        config = CLIPTextConfig(
            hidden_size=TEXT,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=6,
            max_position_embeddings=7,
        )
        CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "a": 3, "b": 4, "b</w>": 5}
    (tokenizer / "vocab.json").write_text(json.dumps(vocabulary))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(tokenizer / "vocab.json"), str(tokenizer / "merges.txt")).save_pretrained(tokenizer)
    return folder
