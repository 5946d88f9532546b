"""Features of latents for the MMD kernel: the latents, fixed random convolutions of them, or the expert's features."""

from collections.abc import Callable
from copy import deepcopy

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from ensemble.compression.common.calibration_data import record_calls
from ensemble.compression.common.network_stages import STAGE, image_features
from ensemble.compression.distillation.config import FeatureKind
from ensemble.compression.method import StageError
from experts.conditions.condition import Condition
from experts.expert import Expert
from experts.training.trainer import check_device
from experts.types import Latents

Rows = Float[Tensor, "row feature"]
LatentFeatures = Callable[[Latents], Rows]
WIDTHS = (32, 64)
"""Filters of the random convolutions, each of which halves the side."""
NEARLY_CLEAN = 0.1
"""The t at which the expert computes features of latents."""


def latent_features(kind: FeatureKind, expert: Expert, seed: int, device: str = "cpu") -> LatentFeatures:
    """Return a differentiable function of latents; raise `StageError` if the kind does not fit them or the network."""
    if kind == "latents":
        return lambda latents: latents.flatten(1).float()
    return _expert_features(expert, device) if kind == "expert" else _filter_features(expert.latent_shape, seed)


def _expert_features(expert: Expert, device: str) -> LatentFeatures:
    """Return a function that computes the output of the network's middle stage on latents at a small t."""
    stages = [path for path, _ in expert.model.named_modules() if STAGE.fullmatch(path)]
    if not stages:
        raise StageError("distill.features=expert needs a network of several stages; set distill.features=latents")
    middle = stages[len(stages) // 2]
    model = deepcopy(expert.model).to(check_device(device)).eval().requires_grad_(False)
    frozen = Expert(
        model=model,
        prediction=expert.prediction,
        noise_schedule=expert.noise_schedule,
        latent_shape=expert.latent_shape,
        num_classes=expert.num_classes,
        cluster_id=expert.cluster_id,
    )

    def compute(latents: Latents) -> Rows:
        outputs: list[Tensor] = []
        stage = model.get_submodule(middle)
        with record_calls(model, [middle], lambda _, inputs, output: outputs.append(image_features(stage, output))):
            t = latents.new_full((len(latents),), NEARLY_CLEAN)
            frozen.velocity(latents, t, Condition.null(len(latents), latents.device))
        return outputs[0].flatten(1).float()

    return compute


def _filter_features(latent_shape: tuple[int, ...], seed: int) -> LatentFeatures:
    """Return a function that applies fixed random convolutions to latents."""
    if len(latent_shape) != 3:
        raise StageError(
            f"distill.features=random_conv needs latents of shape (channels, side, side), not {latent_shape}; set "
            "distill.features=latents"
        )
    filters = _random_filters(latent_shape[0], seed)

    def compute(latents: Latents) -> Rows:
        hidden = latents.float()
        for layer in filters:
            hidden = functional.relu(functional.conv2d(hidden, layer.to(hidden.device), stride=2, padding=1))
        return hidden.flatten(1)

    return compute


def _random_filters(channels: int, seed: int) -> list[Float[Tensor, "_ _ 3 3"]]:
    """Sample Gaussian 3 x 3 filters that keep the variance through a ReLU (He et al. 2015, arXiv:1502.01852)."""
    generator, widths = torch.Generator().manual_seed(seed), (channels, *WIDTHS)
    return [
        torch.randn(out, into, 3, 3, generator=generator) * (2 / (9 * into)) ** 0.5
        for into, out in zip(widths, widths[1:], strict=False)
    ]
