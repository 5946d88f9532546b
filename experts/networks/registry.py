"""Build, call and load the networks that an expert can have: classes behind one call, by their adapters.

Every network takes t in [0, 1], one number a row, and the condition of every row.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from experts.architectures.task_routing import NAME as TASK_ROUTING
from experts.architectures.task_routing import add_task_routing, set_task_times
from experts.compressed.distillation.interval_embedding import NAME as INTERVAL
from experts.compressed.distillation.interval_embedding import add_interval_embedding
from experts.conditions.condition import Condition
from experts.conditions.null_text import get_null_text, load_null_text, set_null_text
from experts.conditions.text_embedding import TextEmbedding
from experts.networks.adapters.adapter import Adapter, CallInputs, DataShape
from experts.networks.adapters.registry import ADAPTERS
from experts.networks.class_settings import AnyNetworkConfig, NetworkError, class_settings
from experts.networks.latent_shapes import check_blocks, check_condition, check_latent_shape, complete_settings
from experts.networks.model_io import check_tensors, load_model, read_class_name
from experts.types import Latents, RowTimes, Times

NetworkCall = Callable[[Any, Latents, Tensor, Condition], Tensor]
"""Maps (model, noised, t of every row, condition with the null text filled in) to a prediction."""

PACKED_SIDE = 2
"""Side of the square of latents that is packed into a token."""


def pack_latents(latents: Tensor) -> Tensor:
    """Turn (batch, channel, height, width) into (batch, token, 4 x channel)."""
    squares = nn.functional.pixel_unshuffle(latents, PACKED_SIDE)
    return squares.flatten(2).transpose(1, 2)


def unpack_latents(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return latents from tokens; the inverse of `pack_latents`."""
    rows, _, features = tokens.shape
    squares = tokens.transpose(1, 2).reshape(rows, features, *grid)
    return nn.functional.pixel_shuffle(squares, PACKED_SIDE)


def call_adapted(adapter: Adapter, model: Any, noised: Latents, t: Tensor, condition: Condition) -> Tensor:
    """Call a network by its conventions, and return the prediction by ours."""
    grid, latents = (0, 0) if adapter.is_flat else (noised.shape[-2], noised.shape[-1]), noised
    if adapter.packs:
        grid, latents = (grid[0] // PACKED_SIDE, grid[1] // PACKED_SIDE), pack_latents(noised)
    inputs = CallInputs(latents=latents, timestep=adapter.timestep(t), condition=condition, grid=grid)
    output = model(**adapter.arguments(model, inputs))
    output = output[0] if isinstance(output, tuple) else output
    if isinstance(output, list):
        output = torch.stack(output).squeeze(2)
    if adapter.packs:
        output = unpack_latents(output, grid)
    predicted: Tensor = output if adapter.sign == 1 else -output
    return predicted


CALLS: dict[str, NetworkCall] = {name: partial(call_adapted, adapter) for name, adapter in ADAPTERS.items()}
"""By the name of the network's class."""


def build_network(
    config: AnyNetworkConfig, latent_shape: tuple[int, ...], num_classes: int, null_text: TextEmbedding | None = None
) -> nn.Module:
    """Build a network with parameters from torch's global generator; raise `NetworkError` if it does not fit.

    `null_text` is the encoded "", one row, whose shapes are those of every text; None is a network without text.
    """
    text_shape = None if null_text is None else null_text.shape
    check_latent_shape(config, latent_shape)
    check_condition(config, num_classes, text_shape)
    network = class_settings(config)
    data = DataShape(latent_shape=latent_shape, num_classes=num_classes, text_shape=text_shape)
    derived = network.adapter.data_settings(complete_settings(network), data)
    try:
        model = network.adapter.model_class()(**network.settings, **derived)
    except Exception as error:  # noqa: BLE001 - the border to classes of diffusers, which raise errors of any kind
        raise NetworkError(f"{network.class_name} cannot be built: {error}; change network.settings") from error
    return set_null_text(_without_label_dropout(model), null_text)


def call_network(model: nn.Module, noised: Latents, t: Times, condition: Condition) -> Latents:
    """Return the network's prediction for every row; t is one number, or one a row."""
    call, t = resolve_call(model, noised, t)
    return call(model, noised, t, condition.filled(get_null_text(model)))


def resolve_call(model: nn.Module, noised: Latents, t: Times) -> tuple[NetworkCall, RowTimes]:
    """Return the network's call function and t of every row; `Expert.velocity` uses them to save a stack frame.

    The call function takes a condition whose null text is filled in.
    """
    if t.ndim > 1:
        raise NetworkError(
            f"this network takes one t a row, not t of shape {tuple(t.shape)}; pass {len(noised)} numbers"
        )
    name = type(model).__name__.removeprefix("FSDP")  # a sharded network has a class of its own
    t = t if t.ndim and len(t) == len(noised) else t.expand(len(noised))
    set_task_times(model, t)
    return CALLS[name], t


def load_network(folder: Path) -> nn.Module:
    """Load a network for inference; raise an `ArtifactError` if it is invalid or of another kind."""
    model_class = ADAPTERS[read_class_name(folder, ADAPTERS)].model_class()
    return set_null_text(_without_label_dropout(load_model((model_class,), folder)), load_null_text(folder))


def check_network_files(folder: Path) -> None:
    """Raise an `ArtifactError` if a network's files lack tensors or have unknown ones; reads no weights."""
    check_tensors(ADAPTERS[read_class_name(folder, ADAPTERS)].model_class(), folder)


def enable_gradient_checkpointing(model: nn.Module, function: Callable[..., Any] | None = None) -> None:
    """Compute activations again in the backward pass, in place; raise `NetworkError` for a class that cannot.

    `function` is called with (block, inputs …) in place of torch's checkpointing.
    """
    name = type(model).__name__
    if fault := ADAPTERS[name].checkpointing_fault:
        raise NetworkError(
            f"{name} has no gradient checkpointing here: {fault}; set training.gradient_checkpointing=false"
        )
    checkpointed: Any = model
    checkpointed.enable_gradient_checkpointing(function)


def compile_for_training(model: nn.Module) -> None:
    """Call `torch.compile` on a network that is trained, in place."""
    # With the optimization of layouts of torch 2.13, most layers of a U-Net get gradients of zero on a CPU.
    model.compile(options={"layout_optimization": False})


def extend_by_intervals(model: nn.Module, *, has_guidance: bool = False) -> nn.Module:
    """Let a network take the length of a jump beside t, in place, and return it; its output stays until it is trained.

    With `has_guidance`, a guidance scale is an input too. Raises `NetworkError` for a network whose embedding of t is
    not found.
    """
    pattern = ADAPTERS[type(model).__name__].time_embedding
    paths = [path for path, _ in model.named_modules() if re.fullmatch(pattern, path)]
    if not paths:
        raise NetworkError(f"no layers of this {type(model).__name__} embed t: none is called {pattern}")
    try:
        for path in paths:
            add_interval_embedding(model, f"{path}.{INTERVAL}", {"has_guidance": True} if has_guidance else None)
    except ValueError as error:
        raise NetworkError(f"this {type(model).__name__} takes no interval: {error}; quantize it afterwards") from error
    return model


def block_paths(model: nn.Module) -> list[str]:
    """Return the paths of the blocks that add to hidden states of one width, in their order; none for `UNet2DModel`."""
    pattern = ADAPTERS[type(model).__name__].blocks
    return [path for path, _ in model.named_modules() if pattern and re.fullmatch(pattern, path)]


def route_tasks(model: nn.Module, share: float, power: float) -> nn.Module:
    """Let each t activate a share of the channels of every block, in place, and return the network.

    Raises `NetworkError` for a class without such blocks, and for a network that is routed already.
    """
    name, adapter = type(model).__name__, ADAPTERS[type(model).__name__]
    check_blocks(name)
    settings = {"share": share, "power": power, "blocks": block_paths(model), "output": adapter.block_output}
    try:
        add_task_routing(model, TASK_ROUTING, settings)
    except ValueError as error:
        raise NetworkError(
            f"this {name} cannot be routed by t: {error}; leave expert.task_share at 1, which keeps the routing of a "
            "checkpoint"
        ) from error
    return model


def set_attention_backend(model: nn.Module, backend: str) -> None:
    """Choose diffusers' attention backend, in place; raise `NetworkError` where it has no effect or is not there."""
    name = type(model).__name__
    if not ADAPTERS[name].has_attention_backends:
        able = ", ".join(other for other, adapter in ADAPTERS.items() if adapter.has_attention_backends)
        raise NetworkError(
            f"training.attention_backend would change nothing: {name} always uses torch's own attention; leave it "
            f"empty, or choose one of {able}"
        )
    chosen: Any = model
    try:
        chosen.set_attention_backend(backend)
    except (ValueError, RuntimeError, ImportError) as error:
        raise NetworkError(f"attention backend {backend!r} cannot be used: {error}; leave it empty") from error


def _without_label_dropout(model: nn.Module) -> nn.Module:
    """Disable DiT's label dropout in place: the batch alone decides which rows are null."""
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
    return model
