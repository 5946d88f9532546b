"""Import Paris, the published ensemble of Bagel Labs 2025, arXiv:2510.03434: its folder becomes a pipeline of ours.

expert_0/ ...   DiT with cross-attention: converts into diffusers' `PixArtTransformer2DModel`, tensor by tensor
router/         p(k | noised, t), without text
vae/, text_encoder/, tokenizer/

Experts predict the velocity of rectified flow. Their projection of the text is a linear layer before the keys and
values of cross-attention, and is multiplied into them. CLIP's encoding is read with its padding.

diffusers' class has an epsilon of 1e-6 in its last norm where Paris has 1e-5. The imported networks have Paris' value,
and saved ones record it, for us: in plain diffusers their velocities deviate by about 3e-5.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PixArtTransformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ddm_core.artifacts import read_json
from ensemble.pipeline_folder import PipelineError
from ensemble.pipelines.diffusion_pipeline import EnsembleDiffusionPipeline
from ensemble.pipelines.trusted_files import check_files
from ensemble.solvers import make_noise
from experts.codecs.autoencoder import AutoencoderCodec, load_autoencoder
from experts.conditions.null_text import set_null_text
from experts.conditions.unmasked_text_encoder import UnmaskedTextEncoder
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.networks.model_io import set_last_epsilon
from experts.networks.pretrained_files import WEIGHTS
from router.models.dit import DiTRouter
from router.router import Router

Tensors = Mapping[str, Tensor]
ROUTER_WEIGHTS = "pytorch_model.safetensors"
EPSILON = 1e-5
PRIOR_SAMPLES = 256
HEAD_SETTINGS = ("num_attention_heads", "num_heads", "heads")
DIRECT = {
    "patch_embed": "pos_embed.proj",
    "time_embed.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "time_embed.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "final_layer.linear": "proj_out",
}
"""Layers of Paris by the names of the same layers in diffusers' class."""
DIRECT_IN_BLOCK = {
    "mlp.0": "ff.net.0.proj",
    "mlp.2": "ff.net.2",
    "attn.out_proj": "attn1.to_out.0",
    "cross_attn.out_proj": "attn2.to_out.0",
}


def import_paris(folder: Path) -> EnsembleDiffusionPipeline:
    """Load a folder of Paris; no file of it is executed, and none is changed.

    The prior of the experts, which `sticky` needs, is the router's mean at t = 1. Raises `PipelineError` for files that
    are missing, or tensors that this layout does not have.
    """
    check_files(folder)
    vae: Any = load_autoencoder(folder / "vae")
    encoder = UnmaskedTextEncoder.load(folder)
    experts: dict[str, Any] = {}
    for path in sorted(folder.glob("expert_*"), key=lambda path: int(path.name.removeprefix("expert_"))):
        network = convert_expert(_read(path / WEIGHTS), _count_heads(path))
        experts[path.name] = set_null_text(network, encoder.null_text)
    if not experts:
        raise PipelineError(f"{folder} has no expert_0, expert_1 ...; give the folder of the published weights")
    router = convert_router(_read(folder / "router" / ROUTER_WEIGHTS), _count_heads(folder / "router"))
    set_null_text(router.model, encoder.null_text)
    first = next(iter(experts.values()))
    side = first.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
    return EnsembleDiffusionPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        codec=AutoencoderCodec(image_shape=(side, side, vae.config.out_channels), model=vae),
        router=router,
        text_encoder=encoder,
        **experts,
    )


def convert_expert(tensors: Tensors, heads: int) -> PixArtTransformer2DModel:
    """Return the network of diffusers with the weights of an expert; every tensor is used once.

    Raises `PipelineError` for tensors of another layout, and for positions that are not the table of sines.
    """
    left = dict(tensors)
    try:
        network = _build(left, heads)
        converted = _convert_tensors(left, len(network.transformer_blocks))
        if left:
            raise PipelineError(f"this layout of Paris has no {', '.join(sorted(left)[:5])}; it would be lost")
        network.load_state_dict(converted, strict=True)
    except (KeyError, RuntimeError) as error:
        raise PipelineError(f"these are not the tensors of an expert of Paris: {error}") from error
    set_last_epsilon(network, EPSILON)
    return network.eval()


def _build(left: dict[str, Tensor], heads: int) -> PixArtTransformer2DModel:
    """Return a new network of the size that the tensors have, and take the positions out of them."""
    width, channels, patch = left["patch_embed.weight"].shape[:3]
    positions = left.pop("pos_embed")[0]
    grid = math.isqrt(len(positions))
    table = get_2d_sincos_pos_embed(width, grid, base_size=grid, output_type="pt").float()
    if table.shape != positions.shape or (table - positions).abs().max() > EPSILON:
        raise PipelineError(
            "the positions are not the table of sines that diffusers' class computes; they were learned"
        )
    return PixArtTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=channels,
        out_channels=left["final_layer.linear.bias"].shape[0] // patch**2,
        num_layers=len({name.split(".")[1] for name in left if name.startswith("layers.")}),
        cross_attention_dim=left["text_proj.weight"].shape[1],
        caption_channels=None,
        sample_size=grid * patch,
        patch_size=patch,
        norm_eps=EPSILON,
        use_additional_conditions=False,
    )


def _convert_tensors(left: dict[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """Move all tensors out of `left`, under the names of diffusers' class."""
    names = DIRECT | {
        f"layers.{number}.{ours}": f"transformer_blocks.{number}.{theirs}"
        for number in range(blocks)
        for ours, theirs in DIRECT_IN_BLOCK.items()
    }
    converted = {
        f"{theirs}.{kind}": left.pop(f"{ours}.{kind}") for ours, theirs in names.items() for kind in ("weight", "bias")
    }
    converted["scale_shift_table"] = left.pop("final_layer.scale_shift_table")
    text_weight, text_bias = (left.pop(f"text_proj.{kind}").double() for kind in ("weight", "bias"))
    for number in range(blocks):
        ours, theirs = f"layers.{number}", f"transformer_blocks.{number}"
        converted[f"{theirs}.scale_shift_table"] = left.pop(f"{ours}.scale_shift_table")
        for attention, name in (("attn", "attn1"), ("cross_attn", "attn2")):
            weights = left.pop(f"{ours}.{attention}.in_proj_weight").chunk(3)
            biases = left.pop(f"{ours}.{attention}.in_proj_bias").chunk(3)
            for layer, weight, bias in zip(("to_q", "to_k", "to_v"), weights, biases, strict=True):
                if name == "attn2" and layer != "to_q":
                    bias = (weight.double() @ text_bias + bias.double()).float()  # noqa: PLW2901
                    weight = (weight.double() @ text_weight).float()  # noqa: PLW2901
                converted[f"{theirs}.{name}.{layer}.weight"] = weight.contiguous()
                converted[f"{theirs}.{name}.{layer}.bias"] = bias.contiguous()
    return converted


def convert_router(tensors: Tensors, heads: int) -> Router:
    """Return the router with the published weights; its prior is its mean over noise at t = 1.

    Raises `PipelineError` for tensors of another layout.
    """
    try:
        width, channels, patch = tensors["patch_embed.weight"].shape[:3]
        side = math.isqrt(tensors["pos_embed"].shape[1]) * patch
        model = DiTRouter(
            latent_shape=(channels, side, side),
            num_experts=len(tensors["head.4.bias"]),
            width=width,
            depth=len({name.split(".")[1] for name in tensors if name.startswith("layers.")}),
            heads=heads,
            patch_size=patch,
        )
        model.load_state_dict(dict(tensors), strict=True)
    except (KeyError, RuntimeError) as error:
        raise PipelineError(f"these are not the tensors of the router of Paris: {error}") from error
    noise = make_noise(range(PRIOR_SAMPLES), (channels, side, side))
    with torch.no_grad():
        logits = model.eval()(noise, torch.ones(len(noise)), torch.zeros(len(noise), dtype=torch.int64))
    prior = logits.double().softmax(-1).mean(0, keepdim=True)
    return Router(model=model, noise_schedule=RECTIFIED_FLOW, prior_counts=prior)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return {name: tensor.float() for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise PipelineError(f"{path} cannot be read: {error}; copy it again") from error


def _count_heads(folder: Path) -> int:
    """Read the number of heads, which the tensors do not show."""
    config = read_json(folder / "config.json")
    heads = next((config[name] for name in HEAD_SETTINGS if isinstance(config.get(name), int)), None)
    if heads is None:
        raise PipelineError(f"{folder / 'config.json'} must have one of {', '.join(HEAD_SETTINGS)}; add it")
    return int(heads)
