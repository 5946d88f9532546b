"""Parameters, FLOPs and memory of every training, counted on the meta device: no weight is allocated."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from experts.codecs.registry import CODECS
from experts.conditions.condition import Condition
from experts.config import ExpertConfig, TrainingConfig
from experts.networks.latent_shapes import latent_shape_of
from experts.networks.registry import build_network, call_network
from experts.training.flops import count_parameters, forward_flops, training_flops
from orchestrator.config.schema import RunConfig
from orchestrator.pipeline.stage import Stage
from router.config import RouterConfig
from router.costs import training_cost
from router.models.registry import build_router

TRAINING_COPIES = 5
"""float32 values per parameter in a training: weight, gradient, two moments of Adam, exponential moving average."""

FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSize:
    """The size of one training."""

    parameters: int
    flops: float
    """Of the whole training."""
    memory_bytes: int
    """Of parameters, optimizer, average and the activations of one batch, at their peak.

    Attention counts as plain matrix products; a fused kernel keeps less.
    """


def measure_trainings(graph: Sequence[Stage], config: RunConfig, num_classes: int) -> dict[str, TrainingSize]:
    """Return the sizes of codec, experts, monolith and router by stage name; equal networks are built once."""
    shape = latent_shape_of(config.codec, config.data.image_size, config.data.channels)
    sizes: dict[str, TrainingSize] = {}
    by_config: dict[str, TrainingSize] = {}
    for stage in graph:
        if stage.kind == "codec" and (probe := CODECS[config.codec.kind].probe) is not None:
            side, training = config.data.image_size, config.codec.decoder_training
            with torch.device("meta"):
                network, call = probe(config.codec, (side, side, config.data.channels))
            flops = training_flops(forward_flops(call), training.batch_size, training.steps)
            sizes[stage.name] = _training_size(network, call, training, flops)
        elif stage.kind == "router":
            sizes[stage.name] = _measure_router(config.router, shape, config.partition.num_experts, num_classes)
        elif isinstance(expert := getattr(stage.config, "expert", None), ExpertConfig):
            key = repr((expert.network, expert.training.batch_size, expert.training.steps))
            by_config[key] = by_config.get(key) or _measure_expert(expert, shape, num_classes)
            sizes[stage.name] = by_config[key]
    return sizes


def _measure_expert(config: ExpertConfig, shape: tuple[int, ...], num_classes: int) -> TrainingSize:
    with torch.device("meta"):
        network, row = build_network(config.network, shape, num_classes), _Row(shape)
    call = partial(call_network, network, row.noised, row.t, row.condition)
    flops = training_flops(forward_flops(call), config.training.batch_size, config.training.steps)
    return _training_size(network, call, config.training, flops)


def _measure_router(config: RouterConfig, shape: tuple[int, ...], num_experts: int, num_classes: int) -> TrainingSize:
    with torch.device("meta"):
        network, row = build_router(config, shape, num_experts, num_classes), _Row(shape)
    call = partial(network, row.noised, row.t, row.condition.embedding_index(num_classes))
    return _training_size(network, call, config.training, training_cost(config, forward_flops(call), num_experts))


class _Row:
    """One row of inputs."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.noised, self.t = torch.zeros(1, *shape), torch.zeros(1)
        self.condition = Condition.null(1, self.t.device)


def _training_size(
    network: nn.Module, call: Callable[[], Tensor], training: TrainingConfig, flops: float
) -> TrainingSize:
    parameters = count_parameters(network)
    activations = training.batch_size * count_activation_bytes(network, call)
    memory = TRAINING_COPIES * FLOAT_BYTES * parameters + activations
    return TrainingSize(parameters=parameters, flops=flops, memory_bytes=memory)


def count_activation_bytes(network: nn.Module, call: Callable[[], Tensor]) -> int:
    """Return the bytes that a call of the network keeps for its backward pass, parameters excluded."""
    weights = {id(parameter.untyped_storage()) for parameter in network.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[id(storage)] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(storage.nbytes() for key, storage in kept.items() if key not in weights)
