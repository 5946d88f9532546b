"""Layers that are taken out of a network whole: what would have gone through them goes past.

Removable are the layers of a residual network that add to what they are given: residual and attention layers of
diffusers' U-Net, attention and feed-forward layers of its transformer, blocks of our residual network.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers import DiTTransformer2DModel, UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from experts.architectures.residual_mlp import ResidualMLP

PATTERNS: dict[type[nn.Module], re.Pattern[str]] = {
    UNet2DModel: re.compile(r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(resnets|attentions)\.\d+"),
    DiTTransformer2DModel: re.compile(r"transformer_blocks\.\d+\.(attn1|ff)"),
    ResidualMLP: re.compile(r"blocks\.\d+"),
}
"""The paths of such layers."""


class SkipLayer(nn.Module):
    """In the place of a layer that adds to its input: gives back the input, or its first channels."""

    def __init__(self, channels: int | None = None) -> None:
        """`channels` None keeps all; a layer of the way up is given a skip connection's channels behind its own."""
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """The input."""
        return x if self.channels is None else x[:, : self.channels]


class ZeroLayer(nn.Module):
    """In the place of a layer whose answer is added by its owner: says zero."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Zeros."""
        return x.new_zeros(()).expand_as(x)


def removable_layers(model: nn.Module) -> list[str]:
    """Paths of the layers that can still be taken out, in the network's order."""
    pattern = PATTERNS.get(type(model))
    found = model.named_modules() if pattern else ()
    return [path for path, module in found if pattern and pattern.fullmatch(path) and _can_pass(path, module)]


def removed_layers(model: nn.Module) -> list[str]:
    """Paths of the layers that have been taken out."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, SkipLayer | ZeroLayer):
            is_block = isinstance(model, DiTTransformer2DModel) and isinstance(module, SkipLayer)
            found += [f"{path}.attn1", f"{path}.ff"] if is_block else [path]
    return found


def remove_layers(model: nn.Module, paths: Sequence[str]) -> None:
    """Take layers out, in place; `ValueError` for one that is not removable.

    A transformer's block goes whole if both of its layers do; the first one embeds the time for the last layer, so it
    stays.
    """
    known = removable_layers(model)
    if unknown := [path for path in paths if path not in known]:
        raise ValueError(f"{unknown[0]} is no layer that can be taken out; those are {', '.join(known) or 'none'}")
    for path in paths:
        model.set_submodule(path, _replacement(path, model.get_submodule(path)))
    if isinstance(model, DiTTransformer2DModel):
        for number, block in enumerate(model.transformer_blocks):
            if number and isinstance(block.attn1, ZeroLayer) and isinstance(block.ff, ZeroLayer):
                model.transformer_blocks[number] = SkipLayer()


@contextmanager
def layers_disabled(model: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    """The same model with these layers taken out, for as long as the context lasts."""
    kept = {path: model.get_submodule(path) for path in paths}
    try:
        for path, module in kept.items():
            model.set_submodule(path, _replacement(path, module))
        yield
    finally:
        for path, module in kept.items():
            model.set_submodule(path, module)


def _can_pass(path: str, module: nn.Module) -> bool:
    """Whether something of the right shape is left if the layer is gone."""
    if isinstance(module, SkipLayer | ZeroLayer):
        return False
    if isinstance(module, ResnetBlock2D):
        is_plain = not (module.up or module.down)
        return is_plain and (path.startswith("up_blocks") or module.in_channels == module.out_channels)
    return True


def _replacement(path: str, module: nn.Module) -> nn.Module:
    if isinstance(module, ResnetBlock2D):
        return SkipLayer(module.out_channels if module.in_channels != module.out_channels else None)
    return ZeroLayer() if path.startswith("transformer_blocks") else SkipLayer()
