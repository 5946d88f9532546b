"""The networks an expert can have: diffusers models behind one call.

To add one, write how it is built and how it is called, and put both into `NETWORKS`. Every network takes
t in [0, 1], one number a row, and knows `num_classes` classes with the null class behind them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiTTransformer2DModel, UNet2DModel
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from experts.architectures.residual_mlp import ResidualMLP
from experts.condition import Condition
from experts.config import DiTConfig, ResidualMLPConfig, UNetConfig
from experts.diffusion.noise_schedule import Latents, Times
from experts.networks.model_io import load_model

AnyNetworkConfig = ResidualMLPConfig | UNetConfig | DiTConfig

TIMESTEPS = 1000
"""diffusers' models embed timesteps from 0 to 1000, so t is multiplied by this at their door."""


class NetworkError(ValueError):
    """A network cannot work on these latents."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """How one kind of network is built and called."""

    model_class: type[nn.Module]
    build: Callable[[Any, tuple[int, ...], int], nn.Module]
    """(its config, latent shape, number of classes) to a model with fresh parameters."""
    call: Callable[[Any, Latents, Tensor, Condition], Tensor]
    """(model, noised, t of every row, condition) to a prediction."""


def _build_residual_mlp(config: ResidualMLPConfig, latent_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    model: nn.Module = ResidualMLP(
        latent_shape=latent_shape, num_classes=num_classes, width=config.width, depth=config.depth
    )
    return model


def _call_residual_mlp(model: ResidualMLP, noised: Latents, t: Tensor, condition: Condition) -> Tensor:
    predicted: Tensor = model(noised, t, condition.embedding_index(model.config.num_classes))
    return predicted


def _build_unet(config: UNetConfig, latent_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    channels, side = _square(latent_shape, "unet")
    lower_levels = len(config.channels) - 1
    if side % 2**lower_levels:
        raise NetworkError(
            f"unet halves the side {lower_levels} times, and {side} cannot be halved so often; "
            f"give network.channels at most {_halvings(side) + 1} entries, or use residual_mlp"
        )
    if config.attention and config.channels[-1] % 8:
        raise NetworkError(
            f"attention needs the lowest level's channels to be a multiple of 8, not {config.channels[-1]}; "
            "change network.channels or set network.attention=false"
        )
    plain = ["DownBlock2D"] * lower_levels
    model: nn.Module = UNet2DModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=config.channels,
        layers_per_block=config.layers_per_block,
        down_block_types=(*plain, "AttnDownBlock2D" if config.attention else "DownBlock2D"),
        up_block_types=("AttnUpBlock2D" if config.attention else "UpBlock2D", *["UpBlock2D"] * lower_levels),
        add_attention=config.attention,
        norm_num_groups=math.gcd(32, *config.channels),
        num_class_embeds=num_classes + 1,
    )
    return model


def _call_unet(model: UNet2DModel, noised: Latents, t: Tensor, condition: Condition) -> Tensor:
    embeds = model.config.num_class_embeds
    labels = None if embeds is None else condition.embedding_index(embeds - 1)
    predicted: Tensor = model(noised, t * TIMESTEPS, labels, return_dict=False)[0]
    return predicted


def _build_dit(config: DiTConfig, latent_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    channels, side = _square(latent_shape, "dit")
    if side % config.patch_size:
        raise NetworkError(
            f"dit cuts latents into patches of side {config.patch_size}, which does not divide {side}; "
            "change network.patch_size to a divisor, or use residual_mlp"
        )
    model = DiTTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.head_width,
        num_layers=config.depth,
        in_channels=channels,
        sample_size=side,
        patch_size=config.patch_size,
        num_embeds_ada_norm=num_classes,
    )
    return _without_label_dropout(model)


def _call_dit(model: DiTTransformer2DModel, noised: Latents, t: Tensor, condition: Condition) -> Tensor:
    labels = condition.embedding_index(model.config.num_embeds_ada_norm)
    predicted: Tensor = model(noised, t * TIMESTEPS, labels, return_dict=False)[0]
    return predicted


NETWORKS: dict[str, Network] = {
    "residual_mlp": Network(model_class=ResidualMLP, build=_build_residual_mlp, call=_call_residual_mlp),
    "unet": Network(model_class=UNet2DModel, build=_build_unet, call=_call_unet),
    "dit": Network(model_class=DiTTransformer2DModel, build=_build_dit, call=_call_dit),
}

_CALLS = {network.model_class: network.call for network in NETWORKS.values()}


def build_network(config: AnyNetworkConfig, latent_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """A network with fresh parameters, from torch's global generator; `NetworkError` if it does not fit."""
    return NETWORKS[config.kind].build(config, latent_shape, num_classes)


def call_network(model: nn.Module, noised: Latents, t: Times, condition: Condition) -> Latents:
    """The network's own prediction for every row; t is one number, or one a row."""
    if t.ndim > 1:
        raise NetworkError(f"this network takes one t a row, not t of shape {tuple(t.shape)}; give it {len(noised)}")
    return _CALLS[type(model)](model, noised, t.expand(len(noised)), condition)


def load_network(folder: Path) -> nn.Module:
    """The network in a folder, ready for inference; raises an `ArtifactError` if it is broken or of another kind."""
    classes = tuple(network.model_class for network in NETWORKS.values())
    return _without_label_dropout(load_model(classes, folder))


def _without_label_dropout(model: nn.Module) -> nn.Module:
    """Switch off DiT's own label dropout: the batch decides which rows are null, nothing else."""
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
    return model


def _square(latent_shape: tuple[int, ...], kind: str) -> tuple[int, int]:
    """Channels and side of square latents."""
    if len(latent_shape) != 3 or latent_shape[1] != latent_shape[2]:
        raise NetworkError(
            f"{kind} needs latents of shape (channels, side, side), not {latent_shape}; "
            "choose network residual_mlp, or codec pixels"
        )
    return latent_shape[0], latent_shape[1]


def _halvings(side: int) -> int:
    """How often `side` can be halved."""
    return (side & -side).bit_length() - 1
