"""Select the layers that a method quantizes, by their purpose, and pack the weights of all other layers."""

import re
from typing import Literal

from torch import nn

from ensemble.compression.quantization.weight_only import large_weights
from experts.compressed.quantization.packed_weight import pack_weight
from experts.compressed.quantization.packing import Packing

Purpose = Literal["attention", "feed_forward", "time_embedding", "convolution"]

PATHS: dict[Purpose, re.Pattern[str]] = {
    "attention": re.compile(r"(^|\.)(to_q|to_k|to_v|to_out\.0)$"),
    "feed_forward": re.compile(r"(^|\.)(ff\.net\.(0\.proj|2)|blocks\.\d+\.(inner|outer))$"),
    "time_embedding": re.compile(
        r"(^|\.)(norm1\.linear|proj_out_1|time_emb_proj|modulation|timestep_embedder\.linear_[12]"
        r"|time_embedding\.(linear_[12]|[02]))$"
    ),
    "convolution": re.compile(r"(^|\.)resnets\.\d+\.(conv1|conv2|conv_shortcut)$"),
}
"""Module paths of these layers in diffusers' U-Net and transformer, and in our residual network."""


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
