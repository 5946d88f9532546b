"""Select the modules of a network whose outputs are cached, and the steps at which all of them are computed."""

import re
from typing import Any

import numpy as np
from torch import nn

from ensemble.compression.acceleration.config import CacheConfig
from ensemble.compression.common.network_stages import describe_layers
from ensemble.compression.method import StageError
from experts.compressed.pruning.layers import REPLACEMENTS
from experts.networks.adapters.registry import ADAPTERS

ATTENTION = re.compile(r"\.(attn[12]?|attention)(\.|$)|\.attentions\.\d+$")
"""In the paths of attention layers; the others (feed-forward, residual, whole blocks) take part in the union."""
_UNET_BLOCK = r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)"
_UNET_TRANSFORMER = r"attentions\.\d+\.transformer_blocks\.\d+"
PATTERNS: dict[str, dict[str, re.Pattern[str]]] = {
    "PixArtTransformer2DModel": {
        "block": re.compile(r"transformer_blocks\.\d+"),
        "layer": re.compile(r"transformer_blocks\.\d+\.(attn1|attn2|ff)"),
        "unit": re.compile(r"transformer_blocks\.\d+\.(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0|2))"),
    },
    "DiTTransformer2DModel": {
        "block": re.compile(r"transformer_blocks\.\d+"),
        "layer": re.compile(r"transformer_blocks\.\d+\.(attn1|ff)"),
        "unit": re.compile(r"transformer_blocks\.\d+\.(attn1\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0|2))"),
    },
    "SD3Transformer2DModel": {
        "block": re.compile(r"transformer_blocks\.\d+"),
        "layer": re.compile(r"transformer_blocks\.\d+\.(attn|ff|ff_context)"),
        "unit": re.compile(
            r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)|ff(_context)?\.net\.(0|2))"
        ),
    },
    "UNet2DModel": {
        "block": re.compile(_UNET_BLOCK),
        "layer": re.compile(rf"{_UNET_BLOCK}\.(resnets|attentions)\.\d+"),
        "unit": re.compile(rf"{_UNET_BLOCK}\.resnets\.\d+\.conv[12]"),
    },
    "UNet2DConditionModel": {
        "block": re.compile(_UNET_BLOCK),
        "layer": re.compile(rf"{_UNET_BLOCK}\.(resnets\.\d+|{_UNET_TRANSFORMER}\.(attn1|attn2|ff))"),
        "unit": re.compile(
            rf"{_UNET_BLOCK}\.(resnets\.\d+\.conv[12]|"
            rf"{_UNET_TRANSFORMER}\.(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0|2)))"
        ),
    },
    "CogView4Transformer2DModel": {  # its feed-forward layers are called twice, for images and for texts
        "block": re.compile(r"transformer_blocks\.\d+"),
        "layer": re.compile(r"transformer_blocks\.\d+\.attn1"),
        "unit": re.compile(r"transformer_blocks\.\d+\.attn1\.(to_[qkv]|to_out\.0)"),
    },
    "ResidualMLP": {
        "block": re.compile(r"blocks\.\d+"),
        "layer": re.compile(r"blocks\.\d+"),
        "unit": re.compile(r"blocks\.\d+\.(inner|outer)"),
    },
}
"""Paths of the modules that can be cached, by network and level."""

_BLOCK = r"(\w*transformer_blocks|blocks|layers)\.\d+"
_LAYER = r"attn[12]?|attention|ff|ff_context|feed_forward|img_mlp|txt_mlp|proj_mlp|proj_out|(gate|up|down)_proj"
OTHER_TRANSFORMERS: dict[str, re.Pattern[str]] = {
    "block": re.compile(_BLOCK),
    "layer": re.compile(rf"{_BLOCK}\.({_LAYER})"),
    "unit": re.compile(rf"{_BLOCK}\.({_LAYER})(\.[\w.]+)?"),
}
"""The same for all other transformers of diffusers; units are the linear layers among these."""

U_NETS = ("UNet2DModel", "UNet2DConditionModel")


def cacheable_modules(model: nn.Module, config: CacheConfig) -> list[str]:
    """Return the paths of the modules to cache, in the network's order; raise `StageError` if there are none."""
    if config.policy == "deepcache":
        return modules_below_branch(model, config.branch)
    name = type(model).__name__
    patterns = PATTERNS.get(name, OTHER_TRANSFORMERS if name in ADAPTERS else {})
    levels = {level: _matches(model, pattern) for level, pattern in patterns.items()}
    if patterns is OTHER_TRANSFORMERS:
        levels["unit"] = [path for path in levels["unit"] if isinstance(model.get_submodule(path), nn.Linear)]
    paths = levels.get(config.level, [])
    if not paths:
        known = ", ".join(f"{level}: {found[0]} …" for level, found in levels.items() if found)
        remedy = f"set another accelerate.level (levels with modules: {known}" if known else "leave the stage out ("
        raise StageError(
            f"this {name} has no modules of level {config.level}, so nothing would be cached; {remedy}"
            f"{'; ' if known else ''}its layers: {describe_layers(model)})"
        )
    return paths


def _matches(model: nn.Module, pattern: re.Pattern[str]) -> list[str]:
    """Return the paths that match and are not of removed layers."""
    modules = model.named_modules()
    return [path for path, module in modules if pattern.fullmatch(path) and not isinstance(module, REPLACEMENTS)]


def modules_below_branch(model: Any, branch: int) -> list[str]:
    """Return the paths of a U-Net below a branch: without the outermost `branch` residual layers on each side.

    The last layer of the network is always computed too, one more than on the input side. Ma et al. 2024, DeepCache,
    arXiv:2312.00858, section 3.3. Raises `StageError` for another network, or if its first level has fewer layers.
    """
    if type(model).__name__ not in U_NETS:
        raise StageError(
            f"deepcache needs one of the U-Nets {', '.join(U_NETS)}, not a {type(model).__name__}; set "
            "accelerate.policy=uniform"
        )
    blocks: list[nn.Module] = list(model.up_blocks)
    depth = len(model.down_blocks[0].resnets)
    if not 0 <= branch < depth + 1 or len(model.down_blocks) < 2:
        raise StageError(
            f"accelerate.branch must be one of the branches 0 ... {depth} of a U-Net with two levels or more, and is "
            f"{branch}; lower it"
        )
    down = _list_layers("down_blocks.0", model.down_blocks[0])
    up = _list_layers(f"up_blocks.{len(blocks) - 1}", blocks[-1])
    inner = [f"down_blocks.{index}" for index in range(1, len(model.down_blocks))]
    inner += ["mid_block", *(f"up_blocks.{index}" for index in range(len(blocks) - 1))]
    if model.mid_block is None:
        inner.remove("mid_block")
    cached_down = [path for path, layer in down if layer is None or layer >= branch]
    cached_up = [path for path, layer in up if layer is not None and layer < depth - branch]
    return [*cached_down, *inner, *cached_up]


def _list_layers(path: str, block: nn.Module) -> list[tuple[str, int | None]]:
    """Return the paths of a block's layers with their numbers; None for layers that resample."""
    numbered: list[tuple[str, int | None]] = []
    for name in ("resnets", "attentions", "downsamplers", "upsamplers"):
        layers = getattr(block, name, None) or []
        is_layer = name in ("resnets", "attentions")
        numbered += [(f"{path}.{name}.{number}", number if is_layer else None) for number in range(len(layers))]
    return numbered


def uniform_compute_steps(config: CacheConfig, steps: int) -> tuple[int, ...]:
    """Return the steps at which every module is computed, evenly spaced or closer together around `center`.

    This is DeepCache's schedule, uniform or not (Ma et al. 2024); other policies with fixed steps share it.
    s_i = c + sign(l_i) |l_i|^p, as a share of all steps, with l_i evenly from -c^(1/p) to (1 - c)^(1/p), c the center.
    """
    count = max(1, round(steps / config.interval))
    if config.center is None:
        return tuple(
            sorted({int(index * config.interval) for index in range(steps) if index * config.interval < steps})
        )
    low, high = -(config.center ** (1 / config.power)), (1 - config.center) ** (1 / config.power)
    line = np.linspace(low, high, count + 1)[:-1]
    positions = config.center + np.sign(line) * np.abs(line) ** config.power
    return tuple(sorted({0, *(int(min(steps - 1, position * steps)) for position in positions)}))
