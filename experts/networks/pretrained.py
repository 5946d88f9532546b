"""Where a training starts: at a fresh network, or at a checkpoint that may predict something else on another path.

A checkpoint keeps its network, its prediction and its path: the finished expert says so in its `expert.json`, and the
ensemble matches it at equal noise-to-signal ratio. What `init_loss` chooses is where the error is measured: `own` goes
on as the checkpoint was trained; `converted` converts what it puts out to the recipe's prediction and path first, so
that its error is weighted over t as that of the experts beside it. FLOPs that went into a checkpoint are not counted.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from torch import nn

from ddm_core.artifacts import ArtifactError, read_json
from experts.config import ExpertConfig, Prediction
from experts.diffusion.noise_schedule import NOISE_SCHEDULES, NoiseSchedule
from experts.networks.pretrained_files import InitError, init_files
from experts.networks.registry import NetworkError, build_network, load_network


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialModel:
    """A network before its first step, and what its predictions mean."""

    model: nn.Module
    prediction: Prediction
    noise_schedule: NoiseSchedule


def build_initial_model(config: ExpertConfig, latent_shape: tuple[int, ...], num_classes: int) -> InitialModel:
    """A fresh network, or that of the checkpoint; raises `NetworkError` or `InitError` if it does not fit."""
    if config.init is not None:
        return _from_checkpoint(config, Path(config.init), latent_shape, num_classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        model = build_network(config.network, latent_shape, num_classes)
    return InitialModel(
        model=model, prediction=config.prediction, noise_schedule=NOISE_SCHEDULES[config.noise_schedule]
    )


def _from_checkpoint(
    config: ExpertConfig, folder: Path, latent_shape: tuple[int, ...], num_classes: int
) -> InitialModel:
    init_files(folder)
    try:
        model = load_network(folder)
    except ArtifactError as error:
        raise InitError(f"init={folder}: {error}") from error
    _check_fits(model, folder, latent_shape, num_classes)
    said = read_json(folder / "expert.json") if (folder / "expert.json").is_file() else {}
    prediction, path = (
        said.get("prediction", config.init_prediction),
        said.get("noise_schedule", config.init_noise_schedule),
    )
    if path not in NOISE_SCHEDULES:
        raise InitError(f"init={folder} is on the unknown noise path {path!r}; known are {', '.join(NOISE_SCHEDULES)}")
    return InitialModel(model=model, prediction=prediction, noise_schedule=NOISE_SCHEDULES[path])


def _check_fits(model: nn.Module, folder: Path, latent_shape: tuple[int, ...], num_classes: int) -> None:
    knows = model_signature(model)
    if knows.latent_shape != latent_shape:
        raise InitError(
            f"init={folder} knows latents of shape {knows.latent_shape}, and the data have {latent_shape}; "
            "choose another codec or data.image_size, or another checkpoint"
        )
    if knows.out_channels != latent_shape[0]:
        raise InitError(
            f"init={folder} puts out {knows.out_channels} channels for {latent_shape[0]}, so it predicts a variance "
            "too, which we have no use for; take a checkpoint without a learned variance"
        )
    if knows.num_classes != num_classes:
        raise InitError(
            f"init={folder} knows {knows.num_classes} classes and the null class, and the data have {num_classes}; "
            "set data.labels=false for one that knows none, or take another checkpoint"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSignature:
    """What a network was made for."""

    latent_shape: tuple[int, ...]
    out_channels: int
    num_classes: int


def model_signature(model: nn.Module) -> ModelSignature:
    """What a network of `experts.networks` says of itself; a UNet without class embedding knows no classes."""
    config: Any = model.config
    if not isinstance(model, UNet2DModel | DiTTransformer2DModel):
        shape = tuple(config.latent_shape)
        return ModelSignature(latent_shape=shape, out_channels=shape[0], num_classes=config.num_classes)
    if not isinstance(config.sample_size, int):
        raise NetworkError(f"this network is for samples of size {config.sample_size}; only square ones are known here")
    is_unet = isinstance(model, UNet2DModel)
    embeds = (config.num_class_embeds or 1) - 1 if is_unet else config.num_embeds_ada_norm
    return ModelSignature(
        latent_shape=(config.in_channels, config.sample_size, config.sample_size),
        out_channels=config.out_channels or config.in_channels,
        num_classes=embeds,
    )
