"""The class and settings of a network's configuration, and the settings that a class has; imports no torch.

The settings of diffusers' classes are read from their source, since importing one takes seconds.
"""

import ast
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ddm_core.errors import DDMError
from experts.config import DiffusersConfig, DiTConfig, ResidualMLPConfig, UNetConfig
from experts.networks.adapters.adapter import Adapter
from experts.networks.adapters.registry import ADAPTERS

AnyNetworkConfig = ResidualMLPConfig | UNetConfig | DiTConfig | DiffusersConfig


class NetworkError(DDMError, ValueError):
    """A network does not support these latents, conditions or settings."""


class SettingsError(NetworkError):
    """A class of networks is not supported, or its constructor has no such settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassSettings:
    """A network's class, and the arguments of its constructor that do not follow from the data."""

    class_name: str
    settings: Mapping[str, Any]

    @property
    def adapter(self) -> Adapter:
        """Return the class's conventions; raise `SettingsError` for a class that is not supported."""
        if self.class_name not in ADAPTERS:
            close = difflib.get_close_matches(self.class_name, ADAPTERS, n=1)
            raise SettingsError(
                f"expert.network.class_name must be one of {', '.join(ADAPTERS)}; got {self.class_name or 'none'}"
                + (f"; did you mean {close[0]}?" if close else "")
            )
        return ADAPTERS[self.class_name]


def class_settings(config: AnyNetworkConfig) -> ClassSettings:
    """Return the class and settings of a configuration."""
    if isinstance(config, ResidualMLPConfig):
        settings: dict[str, Any] = {"width": config.width, "depth": config.depth, "input_skip": config.input_skip}
        return ClassSettings(class_name="ResidualMLP", settings=settings)
    if isinstance(config, UNetConfig):
        return ClassSettings(class_name="UNet2DModel", settings=_unet_settings(config))
    if isinstance(config, DiTConfig):
        settings = {
            "num_attention_heads": config.heads,
            "attention_head_dim": config.head_width,
            "num_layers": config.depth,
            "patch_size": config.patch_size,
        }
        return ClassSettings(class_name="DiTTransformer2DModel", settings=settings)
    return ClassSettings(class_name=config.class_name, settings=config.settings)


def _unet_settings(config: UNetConfig) -> dict[str, Any]:
    down_blocks = ["DownBlock2D"] * (len(config.channels) - 1)
    up_blocks = ["UpBlock2D"] * (len(config.channels) - 1)
    return {
        "block_out_channels": config.channels,
        "layers_per_block": config.layers_per_block,
        "down_block_types": (*down_blocks, "AttnDownBlock2D" if config.attention else "DownBlock2D"),
        "up_block_types": ("AttnUpBlock2D" if config.attention else "UpBlock2D", *up_blocks),
        "add_attention": config.attention,
        "norm_num_groups": _count_groups(config.channels),
    }


def _count_groups(channels: Sequence[int]) -> int:
    """Return the groups of a U-Net's normalizations, of four channels or more where all levels have four.

    t and the class are added to each channel alone, so that normalizing groups of one channel would remove them.
    """
    return math.gcd(32, *channels, *(max(1, count // 4) for count in channels))


@cache
def default_settings(adapter: Adapter) -> Mapping[str, Any]:
    """Return every setting of a class with its default; None for one without."""
    definitions = ast.parse(_source(adapter).read_text(encoding="utf-8")).body
    (class_node,) = (node for node in definitions if isinstance(node, ast.ClassDef) and node.name == adapter.class_name)
    (init,) = (node for node in class_node.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    names, defaults = [argument.arg for argument in init.args.args[1:]], init.args.defaults
    values = [None] * (len(names) - len(defaults)) + [ast.literal_eval(default) for default in defaults]
    return dict(zip(names, values, strict=True))


def _source(adapter: Adapter) -> Path:
    """Return the file of a class, found without importing its package's contents."""
    if adapter.module.startswith("experts."):
        return Path(__file__).parents[2].joinpath(*adapter.module.split(".")).with_suffix(".py")
    package = find_spec("diffusers")
    if package is None or package.origin is None:
        raise NetworkError("diffusers must be installed to read the settings of its networks; install it")
    return Path(package.origin).parent.joinpath("models", *adapter.module.split(".")).with_suffix(".py")
