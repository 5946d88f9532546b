"""A network built and called once, a large one without memory for its weights: whether its settings work."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from experts.conditions.condition import Condition
from experts.conditions.text_embedding import TextEmbedding
from experts.networks.adapters.adapter import DataShape
from experts.networks.adapters.registry import ADAPTERS
from experts.networks.class_settings import AnyNetworkConfig, NetworkError
from experts.networks.latent_shapes import network_name
from experts.networks.model_io import SkipRandomInit
from experts.networks.registry import build_network, resolve_call
from experts.training.flops import count_parameters, forward_flops
from experts.training.memory import FusedAttention

MOST_REAL_PARAMETERS = 20_000_000
"""Networks up to this size are called on the CPU, which finds indices out of bounds too: less than a second."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """Inputs of a network."""

    noised: Tensor
    t: Tensor
    condition: Condition


def empty_inputs(rows: int, data: DataShape, *, has_lengths: bool = False) -> Inputs:
    """Return inputs on the default device, with the longest texts; their mask has values with `has_lengths`."""
    text = None
    if data.text_shape is not None:
        tokens, width, pooled_width = data.text_shape
        text = TextEmbedding(
            torch.zeros(rows, tokens, width),
            torch.ones(rows, tokens, dtype=torch.bool, device="cpu" if has_lengths else None),
            torch.zeros(rows, pooled_width),
            torch.zeros(rows, dtype=torch.bool),
        )
    class_id = torch.zeros(rows, dtype=torch.int64)
    return Inputs(torch.zeros(rows, *data.latent_shape), torch.zeros(rows), Condition(class_id, text))


def build_empty(config: AnyNetworkConfig, data: DataShape, device: str) -> nn.Module:
    """Build a network on a device without values of its parameters; raise `NetworkError` if it does not fit."""
    with torch.device(device), SkipRandomInit():
        null_text = empty_inputs(1, data).condition.text
        return build_network(config, data.latent_shape, data.num_classes, null_text)


def prepare_call(network: nn.Module, rows: int, data: DataShape, device: str) -> Callable[[], Tensor]:
    """Return the call of a network on so many rows."""
    with torch.device(device):
        inputs = empty_inputs(rows, data, has_lengths=ADAPTERS[type(network).__name__].reads_lengths)
    function, t = resolve_call(network, inputs.noised, inputs.t)
    return partial(function, network, inputs.noised, t, inputs.condition)


def try_network(config: AnyNetworkConfig, data: DataShape) -> None:
    """Build a network and call it on one row; raise `NetworkError` if either fails.

    Classes of diffusers check few of their settings: many that do not fit each other can be built, and fail in a call.
    """
    network, device = build_empty(config, data, "meta"), "meta"
    if count_parameters(network) <= MOST_REAL_PARAMETERS:
        network, device = build_empty(config, data, "cpu"), "cpu"
    predicted: list[Tensor] = []
    try:
        with FusedAttention():  # the plain one cannot mask attention on the meta device by a mask of the CPU
            forward_flops(lambda: predicted.append(prepare_call(network, 1, data, device)()))
    except Exception as error:  # noqa: BLE001 - the border to classes of diffusers, which raise errors of any kind
        raise NetworkError(f"{network_name(config)} cannot be called: {error}; change network.settings") from error
    if (shape := tuple(predicted[0].shape[1:])) != data.latent_shape:
        raise NetworkError(
            f"{network_name(config)} returns predictions of shape {shape} for latents of shape {data.latent_shape}; "
            "change network.settings"
        )
