"""Features of an untrained convolutional network.

Random embeddings suffice to distinguish distributions, and depend on no other data set
(Naeem et al. 2020, arXiv:2002.09797, section 3.3).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from data_partition.features.cnn_input import cnn_input
from data_partition.features.fit_sample import read_fit_batches
from data_partition.features.pca import l2_normalize

FILE = "random_conv.safetensors"
SIDE = 32
WIDTHS = (3, 32, 64, 64)
CELLS = 4 * 4
"""Positions in the last layer, one for each 8 x 8 pixels."""
FIT_BATCH = 256


@dataclass(frozen=True, slots=True)
class RandomConvFeatures:
    """Activations of the last of three layers of random filters, minus their mean over the data."""

    filters: tuple[Float[Tensor, "_ _ 3 3"], ...]
    mean: Float32[np.ndarray, " feature"]

    @classmethod
    def fit(cls, shards: Path, components: int, seed: int) -> "RandomConvFeatures":
        """Sample the filters from `seed` and compute the mean of their activations on at most 2^18 of the images."""
        filters = make_random_filters(seed)
        total, count = np.zeros(CELLS * WIDTHS[-1]), 0
        for batch in read_fit_batches(shards, FIT_BATCH):
            total += compute_responses(filters, batch.images).sum(axis=0, dtype=np.float64)
            count += len(batch.images)
        return cls(filters, (total / max(count, 1)).astype(np.float32))

    @property
    def dimension(self) -> int:
        """Return the number of filters of the last layer times the number of positions."""
        return len(self.mean)

    @property
    def flops_per_image(self) -> float:
        """Count the FLOPs of one image."""
        with FlopCounterMode(display=False) as counter:
            compute_responses(self.filters, np.zeros((1, SIDE, SIDE, 3), dtype=np.uint8))
        return float(counter.get_total_flops())

    @property
    def fit_flops_per_image(self) -> float:
        """Return the FLOPs of one evaluation."""
        return self.flops_per_image

    def __call__(self, images: UInt8[np.ndarray, "batch height width channel"]) -> Float32[np.ndarray, "batch feature"]:
        """Return centered activations, each row of Euclidean length one."""
        return l2_normalize(compute_responses(self.filters, images) - self.mean)

    def save(self, folder: Path) -> None:
        """Write the filters themselves, so that they do not depend on the random numbers of a PyTorch version."""
        tensors = {f"filters_{layer}": tensor for layer, tensor in enumerate(self.filters)}
        save_file({**tensors, "mean": torch.from_numpy(self.mean)}, folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> "RandomConvFeatures":
        """Read what `save` wrote."""
        tensors = load_file(folder / FILE)
        filters = tuple(tensors[f"filters_{layer}"] for layer in range(len(tensors) - 1))
        return cls(filters, tensors["mean"].numpy())


def make_random_filters(seed: int) -> tuple[Float[Tensor, "_ _ 3 3"], ...]:
    """Sample Gaussian 3 x 3 filters that preserve variance through a ReLU (He et al. 2015, arXiv:1502.01852)."""
    generator = torch.Generator().manual_seed(seed)
    pairs = zip(WIDTHS, WIDTHS[1:], strict=False)
    return tuple(
        torch.randn(outputs, inputs, 3, 3, generator=generator) * (2 / (9 * inputs)) ** 0.5 for inputs, outputs in pairs
    )


@torch.inference_mode()
def compute_responses(
    filters: tuple[Float[Tensor, "_ _ 3 3"], ...], images: UInt8[np.ndarray, "batch height width channel"]
) -> Float32[np.ndarray, "batch feature"]:
    """Compute the activations of the last layer at every position."""
    return apply_filters(filters, cnn_input(images, SIDE)).flatten(1).numpy()


def apply_filters(
    filters: tuple[Float[Tensor, "_ _ 3 3"], ...], images: Float[Tensor, "batch 3 side side"]
) -> Float[Tensor, "batch feature row column"]:
    """Return the activations of the last layer for images from 0 to 1, on their device."""
    hidden = images * 2 - 1
    for layer in filters:
        hidden = functional.relu(functional.conv2d(hidden, layer.to(hidden.device), stride=2, padding=1))
    return hidden
