"""Module paths of a network's stages, at whose ends features are compared, and its layers in words."""

import re
from collections import Counter
from typing import Final

from torch import nn

STAGE: Final = re.compile(r"(down_blocks\.\d+|mid_block|up_blocks\.\d+|transformer_blocks\.\d+|blocks\.\d+)")
"""The blocks of U-Nets and transformers."""


def describe_layers(model: nn.Module) -> str:
    """Return the layers of a network by class, for messages of methods that matched none: `12 Linear, 3 GroupNorm`."""
    counts = Counter(type(module).__name__ for module in model.modules() if not any(module.children()))
    return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "none"
