"""Features at every position of an image, of the networks that cluster the data; as teachers of experts."""

from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from data_partition.errors import UnknownExtractor
from data_partition.features import efficientnet, random_conv
from data_partition.features.cnn_input import resize_to_rgb
from data_partition.features.vision_model import VisionFeatures

Images = Float[Tensor, "batch channel height width"]
"""From 0 to 1."""
Features = Float[Tensor, "batch feature row column"]
TokenNetwork = Callable[[Images], Features]


def load_random_conv(_path: Path | None) -> TokenNetwork:
    """Return the last of three layers of random filters: 64 features at 4 x 4 positions."""
    filters = random_conv.make_random_filters(0)

    def compute(images: Images) -> Features:
        return random_conv.apply_filters(filters, resize_to_rgb(images, random_conv.SIDE))

    return compute


def load_efficientnet(_path: Path | None) -> TokenNetwork:
    """Return the last channels of EfficientNet-lite0: 1,280 at 2 x 2 positions; raises `MissingExtra`."""
    network = efficientnet.load_network()

    def compute(images: Images) -> Features:
        inputs = (resize_to_rgb(images, efficientnet.SIDE) - efficientnet.MEAN) / efficientnet.SCALE
        features: Tensor = network.to(images.device).extract_features(inputs)
        return features

    return compute


def load_vision_network(path: Path | None) -> TokenNetwork:
    """Return the patch tokens of a network of transformers; raises `MissingExtra` or `UnknownExtractor`."""
    if path is None:
        raise UnknownExtractor("a vision network needs its folder, or its name on the Hub; got none")
    return VisionFeatures.open(path).compute_patches


TOKEN_NETWORKS: dict[str, Callable[[Path | None], TokenNetwork]] = {
    "random_conv": load_random_conv,
    "efficientnet_lite0": load_efficientnet,
    "transformers": load_vision_network,
}
"""By the names of `EXTRACTORS` that have features at positions; `pixels` has none."""


@torch.no_grad()
def compute_tokens(
    network: TokenNetwork, images: Images, rows: int, columns: int
) -> Float[Tensor, "batch token feature"]:
    """Return the features at the positions of a grid, of length one each, in rows from the top left."""
    grid = functional.interpolate(network(images), (rows, columns), mode="bilinear")
    return functional.normalize(grid.flatten(2).transpose(1, 2), dim=-1)
