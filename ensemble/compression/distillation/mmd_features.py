"""What a kernel sees of latents: their numbers, what fixed random filters say of them, or what the expert does."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from ensemble.compression.common.calibration_data import record_inputs
from ensemble.compression.common.network_stages import STAGE
from ensemble.compression.distillation.config import FeatureKind
from ensemble.compression.method import StageError
from experts.condition import Condition
from experts.diffusion.noise_schedule import Latents
from experts.expert import Expert
from experts.training.trainer import usable_device

Rows = Float[Tensor, "row feature"]
LatentFeatures = Callable[[Latents], Rows]
WIDTHS = (32, 64)
"""Filters of the layers, each of which halves the side."""
NEARLY_CLEAN = 0.1
"""The t at which an expert is shown latents."""


def latent_features(kind: FeatureKind, expert: Expert, seed: int, device: str = "cpu") -> LatentFeatures:
    """A differentiable function of latents; `StageError` if the kind does not fit them, or the expert's network."""
    if kind == "latents":
        return lambda latents: latents.flatten(1).float()
    return _expert_features(expert, device) if kind == "expert" else _filter_features(expert.latent_shape, seed)


def _expert_features(expert: Expert, device: str) -> LatentFeatures:
    """What comes out of the stages in the middle of its network, when it is shown nearly clean latents as they are."""
    stages = [path for path, _ in expert.model.named_modules() if STAGE.fullmatch(path)]
    if not stages:
        raise StageError("features expert needs a network of several stages; take distill.features=latents")
    middle = stages[len(stages) // 2]
    model = deepcopy(expert.model).to(usable_device(device)).eval().requires_grad_(False)
    frozen = Expert(
        model=model,
        prediction=expert.prediction,
        noise_schedule=expert.noise_schedule,
        latent_shape=expert.latent_shape,
        num_classes=expert.num_classes,
        cluster_id=expert.cluster_id,
    )

    def answers(latents: Latents) -> Rows:
        seen: list[Tensor] = []
        with record_inputs(model, [middle], lambda _, given, said: seen.append(_first(said))):
            t = latents.new_full((len(latents),), NEARLY_CLEAN)
            frozen.velocity(latents, t, Condition.null(len(latents), latents.device))
        return seen[0].flatten(1).float()

    return answers


def _first(said: Tensor | tuple[Any, ...]) -> Tensor:
    """A block of the way down also says what it hands over to the way up."""
    return said if isinstance(said, Tensor) else said[0]


def _filter_features(latent_shape: tuple[int, ...], seed: int) -> LatentFeatures:
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
