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
from experts.conditions.null_text import get_null_text, set_null_text
from experts.conditions.text_embedding import TextEmbedding
from experts.config import ExpertConfig, Prediction
from experts.diffusion.noise_schedule import NOISE_SCHEDULES, NoiseSchedule
from experts.networks.adapters.adapter import DataShape
from experts.networks.adapters.registry import ADAPTERS
from experts.networks.pretrained_files import InitError, check_fits, init_files
from experts.networks.registry import (
    build_network,
    enable_gradient_checkpointing,
    load_network,
    route_tasks,
    set_attention_backend,
)


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
        initial_model = _from_checkpoint(config, Path(config.init), latent_shape, num_classes, null_text)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.training.seed)
            model = build_network(config.network, latent_shape, num_classes, null_text)
        initial_model = InitialModel(
            model=model, prediction=config.prediction, noise_schedule=NOISE_SCHEDULES[config.noise_schedule]
        )
    if config.task_share < 1:
        route_tasks(initial_model.model, config.task_share, config.task_power)
    if config.training.gradient_checkpointing:
        enable_gradient_checkpointing(initial_model.model)
    if config.training.attention_backend is not None:
        set_attention_backend(initial_model.model, config.training.attention_backend)
    return initial_model


def _from_checkpoint(
    config: ExpertConfig,
    folder: Path,
    latent_shape: tuple[int, ...],
    num_classes: int,
    null_text: TextEmbedding | None,
) -> InitialModel:
    init_files(folder)
    try:
        model: Any = load_network(folder)
    except ArtifactError as error:
        raise InitError(f"expert.init: {error}") from error
    _drop_learned_variance(model)
    text_shape = None if null_text is None else null_text.shape
    data = DataShape(latent_shape=latent_shape, num_classes=num_classes, text_shape=text_shape)
    _fit_condition(model, folder, data, null_text)
    check_fits(type(model).__name__, model.config, folder, data)
    metadata = read_json(folder / "expert.json") if (folder / "expert.json").is_file() else {}
    prediction = metadata.get("prediction", config.init_prediction)
    name = metadata.get("noise_schedule", config.init_noise_schedule)
    if name not in NOISE_SCHEDULES:
        raise InitError(
            f"init={folder} has the unknown noise schedule {name!r}; choose a checkpoint with one of "
            f"{', '.join(NOISE_SCHEDULES)}"
        )
    return InitialModel(model=model, prediction=prediction, noise_schedule=NOISE_SCHEDULES[name])


def _drop_learned_variance(model: Any) -> None:
    """Remove the outputs of a variance, in place: the second half of the channels of a network with twice as many.

    The rows of the output layer are those of (row, column, channel) of a patch, with the channel last.
    """
    channels, layer = model.config.get("in_channels"), getattr(model, "proj_out_2", getattr(model, "proj_out", None))
    if not isinstance(layer, nn.Linear) or model.config.get("out_channels") != 2 * channels:
        return
    for name, parameter in layer.named_parameters():
        rows = parameter.detach().reshape(-1, 2 * channels, *parameter.shape[1:])[:, :channels]
        layer.register_parameter(name, nn.Parameter(rows.reshape(-1, *parameter.shape[1:]).clone()))
    layer.out_features //= 2
    model.out_channels = channels
    model.register_to_config(out_channels=channels)


def _fit_condition(model: nn.Module, folder: Path, data: DataShape, null_text: TextEmbedding | None) -> None:
    """Give a checkpoint without a null text that of the data; raise `InitError` if it reads other texts or classes."""
    adapter, ours = ADAPTERS[type(model).__name__], get_null_text(model)
    if data.num_classes and not adapter.reads_classes:
        raise InitError(
            f"init={folder} reads text and no classes; set text.classes=false, or choose another checkpoint"
        )
    if ours is None and null_text is not None and adapter.reads_text:
        set_null_text(model, null_text)
        return
    shapes = [None if text is None else text.shape for text in (ours, null_text)]
    if shapes[0] != shapes[1] or (null_text is None and adapter.reads_text):
        raise InitError(
            f"init={folder} takes texts of (tokens, features, pooled features) {shapes[0]}, and the data have "
            f"{shapes[1]} (None is no text); use the checkpoint's text encoder, or another checkpoint"
        )
