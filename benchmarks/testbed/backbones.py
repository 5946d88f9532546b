"""Tiny sizes of every backbone with inputs, and the published sizes with the data that their papers have."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from experts.conditions.condition import Condition
from experts.conditions.text_embedding import TextEmbedding
from experts.config import DiffusersConfig, NetworkConfig
from experts.networks.adapters.adapter import Adapter, DataShape
from experts.networks.adapters.registry import ADAPTERS
from experts.networks.model_io import SkipRandomInit
from experts.networks.registry import build_network, call_network
from experts.training.flops import count_parameters

HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
SINGLE: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "num_single_layers": 1}
LEVELS: dict[str, Any] = {"block_out_channels": [16, 32], "norm_num_groups": 8}
CROSS: dict[str, Any] = {
    **LEVELS,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 4,
}
TINY: dict[str, dict[str, Any]] = {
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


@dataclass(frozen=True, slots=True)
class PublishedSize:
    """A published network and the data that it has there."""

    millions: float
    """Of parameters."""
    channels: int
    text_shape: tuple[int, int, int] | None = None

    def data(self, side: int = 32) -> DataShape:
        """Return the data at latents of a side; 1,000 classes without text."""
        classes = 0 if self.text_shape else 1000
        return DataShape(latent_shape=(self.channels, side, side), num_classes=classes, text_shape=self.text_shape)


PUBLISHED = {
    "dit_b_2": PublishedSize(147.4, 4),
    "dit_xl_2": PublishedSize(749.8, 4),
    "pixart_xl_2": PublishedSize(611, 4, (120, 4096, 0)),
    "sd15": PublishedSize(859.5, 4, (77, 768, 0)),
    "sdxl": PublishedSize(2567, 4, (77, 2048, 1280)),
    "sd3_medium": PublishedSize(2028, 16, (154, 4096, 2048)),
    "flux_3b": PublishedSize(3263, 16, (128, 2048, 2048)),
    "flux_dev": PublishedSize(11901, 16, (512, 4096, 768)),
    "sana_600m": PublishedSize(592, 32, (300, 2304, 0)),
    "sana_1600m": PublishedSize(1605, 32, (300, 2304, 0)),
    "prx_1b": PublishedSize(1171, 16, (256, 2304, 0)),
    "lumina2": PublishedSize(2610, 16, (256, 2304, 0)),
    "qwen_image": PublishedSize(20430, 16, (128, 3584, 0)),
    "z_image": PublishedSize(6155, 16, (128, 2560, 0)),
    "auraflow": PublishedSize(6833, 4, (256, 2048, 0)),
    "chroma": PublishedSize(8900, 16, (512, 4096, 0)),
    "cogview4": PublishedSize(6369, 16, (224, 4096, 0)),
}
"""By the name of the file in `cluster_configs/expert/`."""


def config_of(case: str) -> DiffusersConfig:
    """Return the configuration of a tiny size."""
    return DiffusersConfig(class_name=case.partition("/")[0], settings=TINY[case])


def text(rows: int, seed: int = 1, tokens: int = TOKENS) -> TextEmbedding:
    """Return up to three texts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([tokens, 4, 1])[:rows]
    return TextEmbedding(
        torch.randn(rows, tokens, WIDTH, generator=generator),
        torch.arange(tokens) < lengths[:, None],
        torch.randn(rows, POOLED, generator=generator),
        torch.zeros(rows, dtype=torch.bool),
    )


def adapter_of(case: str) -> Adapter:
    """Return the conventions of the class."""
    return ADAPTERS[config_of(case).class_name]


def build(case: str) -> nn.Module:
    """Return a network without zero-initialized layers, so that every input matters."""
    torch.manual_seed(0)
    config = config_of(case)
    classes = 0 if adapter_of(case).reads_text else 3
    model = build_network(config, SHAPE, classes, text(1, seed=5) if adapter_of(case).reads_text else None)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def inputs(case: str, shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, Tensor, Condition]:
    """Return latents, t and conditions of three rows."""
    generator = torch.Generator().manual_seed(3)
    with_text = Condition(torch.full((3,), -1), text(3))
    condition = with_text if adapter_of(case).reads_text else Condition(torch.tensor([0, 2, -1]))
    return torch.randn(3, *shape, generator=generator), torch.tensor([0.1, 0.5, 0.9]), condition


def gradients(model: nn.Module, case: str) -> Mapping[str, Tensor | None]:
    """Return the gradient of every parameter of a loss."""
    model.train()
    torch.manual_seed(0)
    torch.autograd.backward(call_network(model, *inputs(case)).square().mean())
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def count_published(network: NetworkConfig, data: DataShape) -> int:
    """Return the parameters of a network, without allocating them."""
    with torch.device("meta"), SkipRandomInit():
        null_text = None if data.text_shape is None else TextEmbedding.zeros(*data.text_shape)
        return count_parameters(build_network(network, data.latent_shape, data.num_classes, null_text))
