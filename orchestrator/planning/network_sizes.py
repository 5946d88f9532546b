"""Parameters, FLOPs and memory of every training, counted on the meta device: no weight is allocated."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor, nn

from experts.codecs.registry import CODECS
from experts.conditions.text_files import read_text_shape
from experts.config import ExpertConfig, TrainingConfig
from experts.networks.adapters.adapter import DataShape
from experts.networks.latent_shapes import latent_shape_of
from experts.networks.registry import enable_gradient_checkpointing
from experts.training.flops import count_parameters, forward_flops, training_flops
from experts.training.memory import (
    FLOAT_BYTES,
    FusedAttention,
    checkpoint_fused,
    kept_bytes,
    part_rows,
    peak_training_bytes,
)
from experts.training.trainer import DeviceError, check_device
from orchestrator.config.schema import RunConfig
from orchestrator.pipeline.stage import Stage
from orchestrator.planning.checks.trial_call import Inputs, build_empty, empty_inputs, prepare_call
from orchestrator.planning.microbenchmarks import measure
from orchestrator.run.worker import limited_threads
from router.config import RouterConfig
from router.costs import training_cost
from router.models.registry import build_router, call_router


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSize:
    """The size of one training."""

    parameters: int
    flops: float
    """Of the whole training; gradient checkpointing computes each forward pass twice."""
    memory_bytes: int
    """On its device, at the peak of a step in float32: parameters, gradients, optimizer, average and activations."""
    checkpoint_bytes: int
    """Of parameters, average and the optimizer's state."""

    def host_bytes(self, device: str) -> int:
        """Return the memory beside that of the device: a checkpoint is gathered there. A CPU has no other."""
        return 0 if device == "cpu" else self.checkpoint_bytes

    def least_seconds(self, device: str, threads: int) -> float | None:
        """Return the time of the training at the rate of matrix products here; None if the device is not here."""
        rate = matrix_rate(device, threads)
        return None if rate is None else self.flops / rate


@cache
def matrix_rate(device: str, threads: int) -> float | None:
    """Measure the FLOPs a second of products of matrices in float32; None without the device."""
    try:
        side = 512 if check_device(device).type == "cpu" else 8192
    except DeviceError:
        return None
    with limited_threads(threads):
        matrix = torch.randn(side, side, device=device)
        durations = [measure(lambda: (matrix @ matrix)[0, 0].item()).wall_s for _ in range(5)]
    return 2 * side**3 / min(durations)


def measure_trainings(graph: Sequence[Stage], config: RunConfig, num_classes: int) -> dict[str, TrainingSize]:
    """Return the sizes of codec, experts, monolith and router by stage name; equal networks are built once."""
    shape = latent_shape_of(config.codec, config.data.image_size, config.data.channels)
    text_shape = read_text_shape(config.text)
    classes_read = num_classes if text_shape is None or config.text.classes else 0
    data = DataShape(latent_shape=shape, num_classes=classes_read, text_shape=text_shape)
    sizes: dict[str, TrainingSize] = {}
    by_config: dict[str, TrainingSize] = {}
    for stage in graph:
        if stage.kind in ("codec", "decoder") and (probe := CODECS[stage.config.kind].probe) is not None:
            sizes[stage.name] = _measure_codec(probe, config)
        elif stage.kind == "router":
            sizes[stage.name] = _measure_router(config.router, config.partition.num_experts, data)
        elif isinstance(expert := getattr(stage.config, "expert", None), ExpertConfig):
            networks = len(expert.time_bounds) + 1  # trained one after the other, each with its part of the batch
            training = replace(expert.training, seed=0, batch_size=expert.training.batch_size // networks)
            key = repr((expert.network, training))
            by_config[key] = by_config.get(key) or measure_expert(replace(expert, training=training), data)
            size = by_config[key]
            sizes[stage.name] = replace(size, parameters=networks * size.parameters, flops=networks * size.flops)
    return sizes


def measure_expert(config: ExpertConfig, data: DataShape) -> TrainingSize:
    """Return the size of an expert's training; `training.batch_size` is its own batch."""
    training = config.training
    network = build_empty(config.network, data, "meta").train()
    with FusedAttention():
        forward = forward_flops(prepare_call(network, 1, data, "meta"))
    flops = training_flops(forward, training.batch_size, training.steps)
    if training.gradient_checkpointing:
        enable_gradient_checkpointing(network, checkpoint_fused)
        flops *= 4 / 3
    return _size_of(network, prepare_call(network, part_rows(training), data, "meta"), training, flops)


def _size_of(network: nn.Module, call: Callable[[], Tensor], training: TrainingConfig, flops: float) -> TrainingSize:
    """Return the size of a training; `call` is the forward pass of a part of a batch, on the meta device."""
    parameters = count_parameters(network)
    return TrainingSize(
        parameters=parameters,
        flops=flops,
        memory_bytes=peak_training_bytes(network, call, training),
        checkpoint_bytes=FLOAT_BYTES * parameters + kept_bytes(network, training),
    )


def _measure_codec(probe: Callable[..., tuple[nn.Module, Callable[[], Tensor]]], config: RunConfig) -> TrainingSize:
    training, side = config.codec.decoder_training, config.data.image_size
    shape = (side, side, config.data.channels)
    with torch.device("meta"):
        flops = training_flops(forward_flops(probe(config.codec, shape)[1]), training.batch_size, training.steps)
        network, call = probe(config.codec, shape, rows=part_rows(training))
    return _size_of(network.train(), call, training, flops)


def _measure_router(config: RouterConfig, num_experts: int, data: DataShape) -> TrainingSize:
    with torch.device("meta"):
        row, batch = empty_inputs(1, data), empty_inputs(part_rows(config.training), data)
        network = build_router(config, data.latent_shape, num_experts, data.num_classes, row.condition.text).train()

    def call(inputs: Inputs) -> Callable[[], Tensor]:
        return partial(call_router, network, inputs.noised, inputs.t, inputs.condition, data.num_classes)

    flops = training_cost(config, forward_flops(call(row)), num_experts)
    return _size_of(network, call(batch), config.training, flops)
