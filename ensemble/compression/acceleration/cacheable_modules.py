"""Which modules of a network can be kept, and at which steps they are computed if all of them are at the same."""

import re

import numpy as np
from diffusers import DiTTransformer2DModel, UNet2DModel
from torch import nn

from ensemble.compression.acceleration.config import CacheConfig
from ensemble.compression.method import StageError
from experts.architectures.residual_mlp import ResidualMLP

FEED_FORWARD = re.compile(r"(transformer_blocks\.\d+\.ff|blocks\.\d+)")
"""The layers that come last in a block."""
PATTERNS: dict[type[nn.Module], dict[str, re.Pattern[str]]] = {
    DiTTransformer2DModel: {
        "block": re.compile(r"transformer_blocks\.\d+"),
        "layer": re.compile(r"transformer_blocks\.\d+\.(attn1|ff)"),
        "unit": re.compile(r"transformer_blocks\.\d+\.(attn1\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0|2))"),
    },
    UNet2DModel: {
        "block": re.compile(r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)"),
        "layer": re.compile(r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(resnets|attentions)\.\d+"),
        "unit": re.compile(r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.resnets\.\d+\.conv[12]"),
    },
    ResidualMLP: {
        "block": re.compile(r"blocks\.\d+"),
        "layer": re.compile(r"blocks\.\d+"),
        "unit": re.compile(r"blocks\.\d+\.(inner|outer)"),
    },
}
"""By network and level: the paths of what may be kept."""


def cacheable_modules(model: nn.Module, config: CacheConfig) -> list[str]:
    """Paths of the modules to keep, in the network's order; `StageError` if there are none."""
    if config.policy == "deepcache":
        return below_branch(model, config.branch)
    pattern = PATTERNS.get(type(model), {}).get(config.level)
    found = [path for path, _ in model.named_modules() if pattern and pattern.fullmatch(path)]
    if not found:
        raise StageError(
            f"a {type(model).__name__} has nothing of level {config.level} that can be kept, so the cache would do "
            "nothing; take another accelerate.level"
        )
    return found


def below_branch(model: nn.Module, branch: int) -> list[str]:
    """All of a U-Net but its first convolution, so many residual layers behind it, and as many and one at the end.

    Ma et al. 2024, DeepCache, arXiv:2312.00858, section 3.3. Raises `StageError` for another network, or if the first
    level is not so deep.
    """
    if not isinstance(model, UNet2DModel):
        raise StageError(f"deepcache keeps the inside of a U-Net, not of a {type(model).__name__}; take policy=uniform")
    blocks: list[nn.Module] = list(model.up_blocks)
    depth = len(model.down_blocks[0].resnets)
    if not 0 <= branch < depth + 1 or len(model.down_blocks) < 2:
        raise StageError(
            f"this U-Net has branches 0 ... {depth} on more than one level; got accelerate.branch={branch}"
        )
    down, up = _parts("down_blocks.0", model.down_blocks[0]), _parts(f"up_blocks.{len(blocks) - 1}", blocks[-1])
    inner = [f"down_blocks.{index}" for index in range(1, len(model.down_blocks))]
    inner += ["mid_block", *(f"up_blocks.{index}" for index in range(len(blocks) - 1))]
    if model.mid_block is None:
        inner.remove("mid_block")
    kept_down = [path for path, layer in down if layer is None or layer >= branch]
    kept_up = [path for path, layer in up if layer is not None and layer < depth - branch]
    return [*kept_down, *inner, *kept_up]


def _parts(path: str, block: nn.Module) -> list[tuple[str, int | None]]:
    """A block's layers with their numbers; what changes the side has none."""
    found: list[tuple[str, int | None]] = []
    for name in ("resnets", "attentions", "downsamplers", "upsamplers"):
        layers = getattr(block, name, None) or []
        is_layer = name in ("resnets", "attentions")
        found += [(f"{path}.{name}.{number}", number if is_layer else None) for number in range(len(layers))]
    return found


def uniform_compute_steps(config: CacheConfig, steps: int) -> tuple[int, ...]:
    """One of so many steps, from the first one on; closer together around `centre`, if there is one.

    s_i = c + sign(l_i) |l_i|^p steps with l_i evenly from -c^(1/p) to (1 - c)^(1/p), c the centre.
    """
    count = max(1, round(steps / config.interval))
    if config.center is None:
        return tuple(
            sorted({int(index * config.interval) for index in range(steps) if index * config.interval < steps})
        )
    low, high = -(config.center ** (1 / config.power)), (1 - config.center) ** (1 / config.power)
    line = np.linspace(low, high, count + 1)[:-1]
    places = config.center + np.sign(line) * np.abs(line) ** config.power
    return tuple(sorted({0, *(int(min(steps - 1, place * steps)) for place in places)}))
