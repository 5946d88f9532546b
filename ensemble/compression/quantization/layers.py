"""Select the layers that a method quantizes, by their purpose, and pack the weights of all other layers."""

import re
from typing import Literal

from torch import nn

from ensemble.compression.quantization.weight_only import large_weights
from experts.compressed.quantization.packed_weight import pack_weight
from experts.compressed.quantization.packing import Packing

Purpose = Literal["attention", "feed_forward", "time_embedding", "convolution"]

PATHS: dict[Purpose, re.Pattern[str]] = {
    "attention": re.compile(
        r"(^|\.)(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|img_qkv_proj|txt_kv_proj|attentions\.\d+\.proj_(in|out))$"
    ),
    "feed_forward": re.compile(
        r"(^|\.)((ff|ff_context|img_mlp|txt_mlp)\.(net\.(0\.proj|2)|linear_[12]|out_projection)"
        r"|feed_forward\.(linear_[123]|w[123])|blocks\.\d+\.(inner|outer|gate_proj|up_proj|down_proj)"
        r"|single_transformer_blocks\.\d+\.proj_(mlp|out))$"
    ),
    "time_embedding": re.compile(
        r"(^|\.)(norm1(_context)?\.linear|proj_out_1|time_emb_proj|modulation(\.lin)?|(timestep|condition)_embedder\.linear_[12]"
        r"|time_embedding\.(linear_[12]|[02])|(adaln_single|time_embed|norm_out|norm)\.linear|norm_out\.linear_1"
        r"|time_step_proj\.linear_[12]|(img|txt)_mod\.1|adaLN_modulation\.[01]|t_embedder\.mlp\.[02]"
        r"|time_in\.(in|out)_layer|distilled_guidance_layer\.(in_proj|out_proj|layers\.\d+\.linear_[12]))$"
    ),
    "convolution": re.compile(r"(^|\.)(resnets\.\d+\.(conv1|conv2|conv_shortcut)|ff\.conv_(inverted|point))$"),
}
"""Module paths of these layers in the classes of diffusers that experts can have, and in our residual network."""


def quantizable_layers(model: nn.Module, *purposes: Purpose) -> list[str]:
    """Return the paths of the linear and convolutional layers with one of these purposes, in the network's order."""
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and any(PATHS[purpose].search(path) for purpose in purposes)
    ]


def pack_rest(model: nn.Module, bits: Literal[4, 8] | None, group_size: int, min_elements: int) -> int:
    """Pack all large weights that are not quantized yet, in place, and return their number; `bits` None packs none."""
    names = [] if bits is None else list(large_weights(model, min_elements))
    for name in names:
        shape = tuple(model.get_parameter(name).shape)
        pack_weight(model, name, Packing(bits=bits or 8, group_size=group_size, shape=shape, scaling="mse"))
    return len(names)
