"""Initial models: a new network, or a checkpoint that may have another prediction type and noise schedule.

A checkpoint keeps its network, prediction type and noise schedule. The finished expert records both in `expert.json`,
and the ensemble matches them at equal noise-to-signal ratio. `init_loss` selects where the error is measured: `own`
uses the checkpoint's prediction and schedule; `converted` first converts the output to those of the config, so that
its error has the same weight over t as that of the other experts. FLOPs that went into a checkpoint are not counted.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddm_core.artifacts import ArtifactError, read_json
from experts.architectures.residual_mlp import ResidualMLP
from experts.conditions.null_text import get_null_text
from experts.conditions.text_embedding import TextEmbedding
from experts.config import ExpertConfig, Prediction
from experts.diffusion.noise_schedule import NOISE_SCHEDULES, NoiseSchedule
from experts.networks.latent_shapes import NetworkError
from experts.networks.pretrained_files import InitError, init_files
from experts.networks.registry import build_network, load_network


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialModel:
    """A network before its first step, with its prediction type and noise schedule."""

    model: nn.Module
    prediction: Prediction
    noise_schedule: NoiseSchedule


def build_initial_model(
    config: ExpertConfig, latent_shape: tuple[int, ...], num_classes: int, null_text: TextEmbedding | None = None
) -> InitialModel:
    """Build a new network, or load the checkpoint; raise `NetworkError` or `InitError` if it does not fit.

    `null_text` is the encoded "" of data with text.
    """
    if config.init is not None:
        return _from_checkpoint(config, Path(config.init), latent_shape, num_classes, null_text)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        model = build_network(config.network, latent_shape, num_classes, null_text)
    return InitialModel(
        model=model, prediction=config.prediction, noise_schedule=NOISE_SCHEDULES[config.noise_schedule]
    )


def _from_checkpoint(
    config: ExpertConfig,
    folder: Path,
    latent_shape: tuple[int, ...],
    num_classes: int,
    null_text: TextEmbedding | None,
) -> InitialModel:
    init_files(folder)
    try:
        model = load_network(folder)
    except ArtifactError as error:
        raise InitError(f"init={folder}: {error}") from error
    _check_fits(model, folder, latent_shape, num_classes)
    _check_text(model, folder, null_text)
    metadata = read_json(folder / "expert.json") if (folder / "expert.json").is_file() else {}
    prediction = metadata.get("prediction", config.init_prediction)
    name = metadata.get("noise_schedule", config.init_noise_schedule)
    if name not in NOISE_SCHEDULES:
        raise InitError(
            f"init={folder} has the unknown noise schedule {name!r}; choose a checkpoint with one of "
            f"{', '.join(NOISE_SCHEDULES)}"
        )
    return InitialModel(model=model, prediction=prediction, noise_schedule=NOISE_SCHEDULES[name])


def _check_fits(model: nn.Module, folder: Path, latent_shape: tuple[int, ...], num_classes: int) -> None:
    signature = model_signature(model)
    if signature.latent_shape != latent_shape:
        raise InitError(
            f"init={folder} takes latents of shape {signature.latent_shape}, and the data have {latent_shape}; "
            "choose another codec or data.image_size, or another checkpoint"
        )
    if signature.out_channels != latent_shape[0]:
        raise InitError(
            f"init={folder} returns {signature.out_channels} channels for {latent_shape[0]}, so it predicts a variance "
            "too, which is not supported; choose a checkpoint without a learned variance"
        )
    if signature.num_classes != num_classes:
        raise InitError(
            f"init={folder} has {signature.num_classes} classes and the null class, and the data have {num_classes}; "
            "set data.labels=false for one without classes, or choose another checkpoint"
        )


def _check_text(model: nn.Module, folder: Path, null_text: TextEmbedding | None) -> None:
    """Raise `InitError` unless a checkpoint reads texts of the data's shapes, or neither has text."""
    ours = get_null_text(model)
    shapes = [None if text is None else text.shape for text in (ours, null_text)]
    if shapes[0] != shapes[1]:
        raise InitError(
            f"init={folder} takes texts of (tokens, features, pooled features) {shapes[0]}, and the data have "
            f"{shapes[1]} (None is no text); use the checkpoint's text encoder, or another checkpoint"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSignature:
    """The shapes and classes that a network was built for."""

    latent_shape: tuple[int, ...]
    out_channels: int
    num_classes: int


def model_signature(model: nn.Module) -> ModelSignature:
    """Read the signature from a network's config; a UNet without class embedding has no classes."""
    config: Any = model.config
    if isinstance(model, ResidualMLP):
        shape = tuple(config.latent_shape)
        return ModelSignature(latent_shape=shape, out_channels=shape[0], num_classes=config.num_classes)
    if not isinstance(config.sample_size, int):
        raise NetworkError(
            f"networks need square samples; this one takes size {config.sample_size}; choose another checkpoint"
        )
    is_unet = type(model).__name__ == "UNet2DModel"
    embeds = (config.num_class_embeds or 1) - 1 if is_unet else config.num_embeds_ada_norm
    return ModelSignature(
        latent_shape=(config.in_channels, config.sample_size, config.sample_size),
        out_channels=config.out_channels or config.in_channels,
        num_classes=embeds,
    )
