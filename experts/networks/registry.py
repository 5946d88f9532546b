"""Registry of the networks that an expert can have: diffusers models behind one call.

To add one, write a build and a call function, and add a row to `NETWORKS`. Every network takes t in [0, 1], one number
a row, and embeds `num_classes` classes followed by the null class.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from experts.architectures.residual_mlp import ResidualMLP
from experts.conditions.condition import Condition
from experts.conditions.null_text import get_null_text, load_null_text, set_null_text
from experts.conditions.text_embedding import TextEmbedding
from experts.config import DiTConfig, ResidualMLPConfig, UNetConfig
from experts.networks.latent_shapes import NetworkError, check_latent_shape
from experts.networks.model_io import load_model, read_class_name
from experts.types import Latents, RowTimes, Times

if TYPE_CHECKING:  # their import takes as long as that of torch, and most workers need none
    from diffusers import DiTTransformer2DModel, UNet2DModel

AnyNetworkConfig = ResidualMLPConfig | UNetConfig | DiTConfig

TIMESTEPS = 1000
"""diffusers' models embed timesteps from 0 to 1000, so t is multiplied by this before a call."""


NetworkCall = Callable[[Any, Latents, Tensor, Condition], Tensor]
"""Maps (model, noised, t of every row, condition) to a prediction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Build and call functions of one kind of network."""

    module: str
    class_name: str
    """Its class in `module`, which is imported when a network is built or loaded; also in `config.json`."""
    build: Callable[[Any, tuple[int, ...], int, TextEmbedding | None], nn.Module]
    """Maps (config, latent shape, number of classes, null text) to a model with new parameters."""
    call: NetworkCall

    @property
    def model_class(self) -> type[nn.Module]:
        """Return the class of the network."""
        model_class: type[nn.Module] = getattr(import_module(self.module), self.class_name)
        return model_class


def _build_residual_mlp(
    config: ResidualMLPConfig, latent_shape: tuple[int, ...], num_classes: int, null_text: TextEmbedding | None
) -> nn.Module:
    model: nn.Module = ResidualMLP(
        latent_shape=latent_shape,
        num_classes=num_classes,
        width=config.width,
        depth=config.depth,
        pooled_width=0 if null_text is None else null_text.pooled.shape[1],
    )
    return model


def _call_residual_mlp(model: ResidualMLP, noised: Latents, t: Tensor, condition: Condition) -> Tensor:
    pooled_text = None if condition.text is None else condition.text.pooled
    predicted: Tensor = model(noised, t, condition.embedding_index(model.config.num_classes), pooled_text)
    return predicted


def _build_unet(
    config: UNetConfig, latent_shape: tuple[int, ...], num_classes: int, null_text: TextEmbedding | None
) -> nn.Module:
    from diffusers import UNet2DModel

    check_latent_shape(config, latent_shape)
    _check_without_text(config.kind, null_text)
    channels, side = latent_shape[:2]
    lower_levels = len(config.channels) - 1
    down_blocks = ["DownBlock2D"] * lower_levels
    model: nn.Module = UNet2DModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=config.channels,
        layers_per_block=config.layers_per_block,
        down_block_types=(*down_blocks, "AttnDownBlock2D" if config.attention else "DownBlock2D"),
        up_block_types=("AttnUpBlock2D" if config.attention else "UpBlock2D", *["UpBlock2D"] * lower_levels),
        add_attention=config.attention,
        norm_num_groups=math.gcd(32, *config.channels),
        num_class_embeds=num_classes + 1,
    )
    return model


def _call_unet(model: "UNet2DModel", noised: Latents, t: Tensor, condition: Condition) -> Tensor:
    num_embeddings = model.config.num_class_embeds
    labels = None if num_embeddings is None else condition.embedding_index(num_embeddings - 1)
    predicted: Tensor = model(noised, t * TIMESTEPS, labels, return_dict=False)[0]
    return predicted


def _build_dit(
    config: DiTConfig, latent_shape: tuple[int, ...], num_classes: int, null_text: TextEmbedding | None
) -> nn.Module:
    from diffusers import DiTTransformer2DModel

    check_latent_shape(config, latent_shape)
    _check_without_text(config.kind, null_text)
    channels, side = latent_shape[:2]
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


def _call_dit(model: "DiTTransformer2DModel", noised: Latents, t: Tensor, condition: Condition) -> Tensor:
    labels = condition.embedding_index(model.config.num_embeds_ada_norm)
    predicted: Tensor = model(noised, t * TIMESTEPS, labels, return_dict=False)[0]
    return predicted


NETWORKS: dict[str, Network] = {
    "residual_mlp": Network(
        module=ResidualMLP.__module__, class_name="ResidualMLP", build=_build_residual_mlp, call=_call_residual_mlp
    ),
    "unet": Network(module="diffusers", class_name="UNet2DModel", build=_build_unet, call=_call_unet),
    "dit": Network(module="diffusers", class_name="DiTTransformer2DModel", build=_build_dit, call=_call_dit),
}

_CALLS = {network.class_name: network.call for network in NETWORKS.values()}


def build_network(
    config: AnyNetworkConfig, latent_shape: tuple[int, ...], num_classes: int, null_text: TextEmbedding | None = None
) -> nn.Module:
    """Build a network with parameters from torch's global generator; raise `NetworkError` if it does not fit.

    `null_text` is the encoded "", one row, whose shapes are those of every text; None is a network without text.
    """
    return set_null_text(NETWORKS[config.kind].build(config, latent_shape, num_classes, null_text), null_text)


def call_network(model: nn.Module, noised: Latents, t: Times, condition: Condition) -> Latents:
    """Return the network's prediction for every row; t is one number, or one a row."""
    call, t = resolve_call(model, noised, t)
    return call(model, noised, t, condition.filled(get_null_text(model)))


def resolve_call(model: nn.Module, noised: Latents, t: Times) -> tuple[NetworkCall, RowTimes]:
    """Return the network's call function and t of every row; `Expert.velocity` uses them to save a stack frame.

    The call function takes a condition whose null text is filled in.
    """
    if t.ndim > 1:
        raise NetworkError(
            f"this network takes one t a row, not t of shape {tuple(t.shape)}; pass {len(noised)} numbers"
        )
    return _CALLS[type(model).__name__], t.expand(len(noised))


def load_network(folder: Path) -> nn.Module:
    """Load a network for inference; raise an `ArtifactError` if it is invalid or of another kind."""
    networks = {network.class_name: network for network in NETWORKS.values()}
    model_class = networks[read_class_name(folder, networks)].model_class
    return set_null_text(_without_label_dropout(load_model((model_class,), folder)), load_null_text(folder))


def _check_without_text(kind: str, null_text: TextEmbedding | None) -> None:
    if null_text is not None:
        raise NetworkError(f"{kind} reads classes and no text; choose another network, or set text=none")


def _without_label_dropout(model: nn.Module) -> nn.Module:
    """Disable DiT's label dropout in place: the batch alone decides which rows are null."""
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
    return model
