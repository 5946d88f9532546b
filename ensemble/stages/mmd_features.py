"""What a kernel sees of latents: their numbers, or what fixed random filters say of them."""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from ensemble.stages.method import StageError
from experts.noise_path import Latents

Rows = Float[Tensor, "row feature"]
LatentFeatures = Callable[[Latents], Rows]
WIDTHS = (32, 64)
"""Filters of the layers, each of which halves the side."""


def latent_features(
    kind: Literal["latents", "random_conv"], latent_shape: tuple[int, ...], seed: int
) -> LatentFeatures:
    """A differentiable function of latents; `StageError` if these are no pictures and filters are asked for."""
    if kind == "latents":
        return lambda latents: latents.flatten(1).float()
    if len(latent_shape) != 3:
        raise StageError(
            f"features random_conv needs latents of shape (channels, side, side), not {latent_shape}; take latents"
        )
    filters = _random_filters(latent_shape[0], seed)

    def answers(latents: Latents) -> Rows:
        hidden = latents.float()
        for layer in filters:
            hidden = functional.relu(functional.conv2d(hidden, layer.to(hidden.device), stride=2, padding=1))
        return hidden.flatten(1)

    return answers


def _random_filters(channels: int, seed: int) -> list[Float[Tensor, "_ _ 3 3"]]:
    """Gaussian 3 x 3 filters that keep the variance through a ReLU (He et al. 2015, arXiv:1502.01852)."""
    generator, widths = torch.Generator().manual_seed(seed), (channels, *WIDTHS)
    return [
        torch.randn(out, into, 3, 3, generator=generator) * (2 / (9 * into)) ** 0.5
        for into, out in zip(widths, widths[1:], strict=False)
    ]
