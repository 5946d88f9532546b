"""Module paths of a network's stages, at whose ends features are compared, and its layers in words."""

import re
from collections import Counter
from typing import Any, Final

from torch import Tensor, nn

STAGE: Final = re.compile(r"(down_blocks\.\d+|mid_block|up_blocks\.\d+|transformer_blocks\.\d+|blocks\.\d+)")
"""The blocks of U-Nets and transformers."""


def image_features(stage: nn.Module, output: Tensor | tuple[Any, ...]) -> Tensor:
    """Return the features of images from a stage's output, which may have skip connections or a text beside them."""
    if isinstance(output, Tensor):
        return output
    # diffusers' JointTransformerBlock returns (text, image), and no text from the last block.
    features: Tensor = output[1] if type(stage).__name__ == "JointTransformerBlock" else output[0]
    return features


def describe_layers(model: nn.Module) -> str:
    """Return the layers of a network by class, for messages of methods that matched none: `12 Linear, 3 GroupNorm`."""
    counts = Counter(type(module).__name__ for module in model.modules() if not any(module.children()))
    return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "none"
