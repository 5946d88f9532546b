"""Layer removal: a removed layer passes on its input.

Removable are the layers that add to their input: residual and attention layers of diffusers' U-Nets, attention and
feed-forward layers of its transformers, also of those inside the U-Net that reads text (of a block for images and texts
together: the joint attention and both feed-forward layers), and blocks of our residual MLP.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from experts.training.flops import count_parameters

PATTERNS: dict[str, re.Pattern[str]] = {
    "UNet2DModel": re.compile(r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(resnets|attentions)\.\d+"),
    "UNet2DConditionModel": re.compile(
        r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)"
        r"\.(resnets\.\d+|attentions\.\d+\.transformer_blocks\.\d+\.(attn1|attn2|ff))"
    ),
    "DiTTransformer2DModel": re.compile(r"transformer_blocks\.\d+\.(attn1|ff)"),
    "PixArtTransformer2DModel": re.compile(r"transformer_blocks\.\d+\.(attn1|attn2|ff)"),
    "SD3Transformer2DModel": re.compile(r"transformer_blocks\.\d+\.(attn|ff|ff_context)"),
    "ResidualMLP": re.compile(r"blocks\.\d+"),
}
"""Paths of removable layers, by the class of the network; importing these takes longer than most stages need."""


class SkipLayer(nn.Module):
    """Replaces a layer that adds to its input: returns the input, or its first channels."""

    def __init__(self, channels: int | None = None) -> None:
        """Return the first `channels`, or all if None; in `up_blocks` the others belong to a skip connection."""
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return the input."""
        return x if self.channels is None else x[:, : self.channels]


class ZeroLayer(nn.Module):
    """Replaces a layer whose output its parent adds: returns zeros."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return zeros in the shape of the input."""
        return x.new_zeros(()).expand_as(x)


class ZeroJointAttention(nn.Module):
    """Replaces an attention over image and text, whose two outputs its parent adds: returns zeros."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """Return zeros in the shapes of both inputs."""
        image, text = (part.new_zeros(()).expand_as(part) for part in (hidden_states, encoder_hidden_states))
        return image, text


REPLACEMENTS = (SkipLayer, ZeroLayer, ZeroJointAttention)


def removable_layers(model: nn.Module) -> list[str]:
    """Return the paths of the layers that can still be removed, in the network's order."""
    pattern = PATTERNS.get(type(model).__name__)
    if pattern is None:
        return []
    return [path for path, module in model.named_modules() if pattern.fullmatch(path) and _is_removable(path, module)]


def advise_pruning(model: nn.Module) -> str:
    """Return what to do with a network that another method of pruning does not change."""
    if removable_layers(model):
        return "set prune=laptop"
    return f"quantize it instead (prune=laptop is for {', '.join(PATTERNS)})"


def removed_layers(model: nn.Module) -> list[str]:
    """Return the paths of the layers that have been removed."""
    removed = []
    for path, module in model.named_modules():
        if isinstance(module, REPLACEMENTS):
            is_block = _is_transformer(model) and isinstance(module, SkipLayer)
            removed += [f"{path}.attn1", f"{path}.ff"] if is_block else [path]
    return removed


def layer_sizes(model: nn.Module) -> dict[frozenset[str], int]:
    """Return the parameters that removing layers frees: of every removable layer alone, and of sets of them.

    A set stands for what is freed in addition once all of its layers are removed: a transformer block's modulation.
    """
    paths = removable_layers(model)
    sizes = {frozenset([path]): count_parameters(model.get_submodule(path)) for path in paths}
    for block in {path.rpartition(".")[0] for path in paths if _drops_block(model, path)}:
        layers = frozenset(path for path in paths if path.startswith(f"{block}."))
        rest = count_parameters(model.get_submodule(block)) - sum(sizes[frozenset([path])] for path in layers)
        sizes[layers] = sizes.get(layers, 0) + rest
    return sizes


def remove_layers(model: nn.Module, paths: Sequence[str]) -> None:
    """Remove layers, in place; raise `ValueError` for one that is not removable.

    A transformer block is removed if both of its layers are. The first block stays: it embeds t for the output layer.
    """
    removable = removable_layers(model)
    if unknown := [path for path in paths if path not in removable]:
        raise ValueError(f"{unknown[0]} is not a removable layer; those are {', '.join(removable) or 'none'}")
    for path in paths:
        model.set_submodule(path, _replacement(path, model.get_submodule(path)))
    for block in {path.rpartition(".")[0] for path in paths if _drops_block(model, path)}:
        if all(isinstance(model.get_submodule(f"{block}.{name}"), ZeroLayer) for name in ("attn1", "ff")):
            model.set_submodule(block, SkipLayer())


@contextmanager
def layers_disabled(model: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    """Remove these layers inside the context, and put them back at its end."""
    layers = {path: model.get_submodule(path) for path in paths}
    try:
        for path, module in layers.items():
            model.set_submodule(path, _replacement(path, module))
        yield
    finally:
        for path, module in layers.items():
            model.set_submodule(path, module)


def _is_transformer(model: nn.Module) -> bool:
    return type(model).__name__ == "DiTTransformer2DModel"


def _drops_block(model: nn.Module, path: str) -> bool:
    """Return whether the layer belongs to a block that is removed with its last layer."""
    return _is_transformer(model) and not path.startswith("transformer_blocks.0.")


def _is_removable(path: str, module: nn.Module) -> bool:
    """Return whether the layer's input has the shape of its output."""
    if isinstance(module, REPLACEMENTS):
        return False
    if isinstance(module, ResnetBlock2D):
        keeps_side = not (module.up or module.down)
        return keeps_side and (path.startswith("up_blocks") or module.in_channels == module.out_channels)
    return True


def _replacement(path: str, module: nn.Module) -> nn.Module:
    if isinstance(module, ResnetBlock2D):
        return SkipLayer(module.out_channels if module.in_channels != module.out_channels else None)
    if path.endswith(".attn"):
        return ZeroJointAttention()
    return ZeroLayer() if "transformer_blocks" in path else SkipLayer()
