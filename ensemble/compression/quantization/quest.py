"""QuEST: weights and activations in few bits, activation scales per timestep, and training of the sensitive layers.

    min sum_l || f_l quantized - f_l ||^2 + || output quantized - output ||^2,   first over layers with time embeddings

Wang et al. 2025, arXiv:2402.03666. Weights have one scale a row and are rounded by AdaRound, layer by layer;
activations and operands of attention have one scale a channel and calibrated time. All other large weights are stored
in few bits and compute in full precision.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from ddm_core.artifacts import Workspace
from ensemble.compression.common.calibration_data import (
    HELD_OUT,
    at_few_step_times,
    calibration_batches,
    output_error,
    record_calls,
    run_network,
    to_uniform_times,
)
from ensemble.compression.common.network_stages import describe_layers
from ensemble.compression.method import ExpertResult, StageError
from ensemble.compression.quantization.activation_grids import round_activations
from ensemble.compression.quantization.adaptive_rounding import round_adaptively
from ensemble.compression.quantization.config import QuESTConfig
from ensemble.compression.quantization.layers import Purpose, pack_rest, quantizable_layers
from ensemble.compression.quantization.quantization_aware import (
    LEARNED_STEPS,
    convert,
    exact_weight,
    fake_quantize_weights,
    pack_quantized_weights,
    train_only,
)
from experts.config import TrainingConfig
from experts.expert import Expert, network_flops
from experts.training.flops import count_parameters, training_flops
from experts.training.latent_dataset import Batch, LatentDataset
from experts.training.trainer import check_device, fit

SENSITIVE: tuple[Purpose, ...] = ("attention", "feed_forward")
MEASURED = 4
"""Batches that measure the error of the network's output."""


def quantize_quest(expert: Expert, dataset: LatentDataset, config: QuESTConfig, workspace: Workspace) -> ExpertResult:
    """Quantize time-embedding, attention, feed-forward and residual layers, then train the sensitive ones.

    Raises `StageError` if there is no such layer, `Preempted` between two steps, after saving, and what `fit` raises.
    """
    model = deepcopy(expert.model)
    paths = quantizable_layers(model, *SENSITIVE, "time_embedding", *(("convolution",) if config.convolutions else ()))
    if not paths:
        raise StageError(
            f"quest needs a layer of diffusers' U-Net or transformer or of the residual network, and expert "
            f"{expert.cluster_id} has none; set quantize to another method (its layers: {describe_layers(model)})"
        )
    paths = round_activations(model, paths, expert, dataset, config, workspace)
    fake_quantize_weights(model, paths, config.bits)
    measuring = calibration_batches(dataset, config.rows, config.seed, MEASURED, HELD_OUT, expert.few_step)
    errors, trained, sizes = {"calibrated": output_error(model, expert, measuring)}, set[str](), dict[str, int]()
    gradient_batches = calibration_batches(dataset, config.rows, config.seed, MEASURED, config.times, expert.few_step)
    if config.adaptive_rounding:
        round_adaptively(model, paths, expert, gradient_batches, workspace)
        errors["rounded"] = output_error(model, expert, measuring)
    row_flops = network_flops(expert.model, expert.latent_shape)
    num_times = config.times if expert.few_step is None else len(expert.few_step.times)
    flops = row_flops * config.rows * (num_times + 3 * MEASURED)
    tunings = _list_tunings(model, paths, config)
    vectors = paths if config.vectors else []
    sensitive = _most_sensitive_layers(model, expert, gradient_batches, tunings, vectors, config)
    for name, training, candidates in tunings:
        chosen = [path for path in candidates if path in sensitive]
        if not chosen and not vectors:
            continue
        sizes |= train_only(model, chosen, vectors)
        trained |= set(chosen)
        model = _tune(model, expert, dataset, chosen, training, workspace.part(name), name == "time_embedding")
        convert(model, paths)
        errors[name] = output_error(model, expert, measuring)
        flops += training_flops(row_flops, training.batch_size, training.steps) * 4 / 3
    steps = {name: size for name, size in sizes.items() if name.endswith(LEARNED_STEPS)}
    share = (sum(sizes.values()) - sum(steps.values())) / count_parameters(expert.model)
    pack_quantized_weights(model, paths)
    rest = pack_rest(model, config.rest_bits, config.group_size, config.min_elements)
    errors["with_the_rest_in_few_bits"] = output_error(model, expert, measuring)
    details = {"output_errors": errors, "trained_share": share, "trained_layers": sorted(trained), "layers": paths}
    details |= {"trained_step_sizes": sum(steps.values()), "weights_stored_in_few_bits": rest}
    return ExpertResult(expert=replace(expert, model=model), modules=len(paths) + rest, flops=flops, details=details)


def _list_tunings(
    model: nn.Module, layers: Sequence[str], config: QuESTConfig
) -> list[tuple[str, TrainingConfig, list[str]]]:
    """Return the configured trainings: name, training configuration and those of `layers`."""
    time_layers = quantizable_layers(model, "time_embedding")
    has_convolutions = config.convolutions and config.sensitive_convolutions
    purposes: tuple[Purpose, ...] = (*SENSITIVE, "convolution") if has_convolutions else SENSITIVE
    sensitive = [path for path in quantizable_layers(model, *purposes) if not path.endswith("to_out.0")]
    tunings = (("time_embedding", config.time_embedding, time_layers), ("sensitive", config.sensitive, sensitive))
    called = {name: [path for path in paths if path in layers] for name, _, paths in tunings}
    return [(name, training, called[name]) for name, training, _ in tunings if training is not None and called[name]]


def _most_sensitive_layers(
    model: nn.Module,
    expert: Expert,
    batches: Sequence[Batch],
    tunings: Sequence[tuple[str, TrainingConfig, list[str]]],
    vectors: Sequence[str],
    config: QuESTConfig,
) -> set[str]:
    """Return the layers to train: those of the largest mean squared gradient, up to `config.trained_share`.

    A small step along the gradient lowers the output error by the squared gradient norm, so this is gain per parameter.
    """
    paths = [path for _, _, candidates in tunings for path in candidates]
    if not paths:
        return set()
    trial = deepcopy(model)
    budget = config.trained_share * count_parameters(expert.model)
    budget -= sum(size for name, size in train_only(trial, [], vectors).items() if not name.endswith(LEARNED_STEPS))
    train_only(trial, paths)
    for batch in batches:
        with torch.no_grad():
            target = run_network(expert.model, expert, batch)
        functional.mse_loss(run_network(trial, expert, batch).float(), target).backward()  # type: ignore[no-untyped-call]
    exact = {path: exact_weight(trial, path) for path in paths}
    gains = {path: float(weight.grad.square().mean()) for path, weight in exact.items() if weight.grad is not None}
    chosen = set()
    for path in sorted(gains, key=lambda path: -gains[path]):
        if exact[path].numel() <= budget:
            chosen.add(path)
            budget -= exact[path].numel()
    return chosen


def _tune(
    model: nn.Module,
    expert: Expert,
    dataset: LatentDataset,
    paths: list[str],
    training: TrainingConfig,
    workspace: Workspace,
    by_layer: bool,
) -> nn.Module:
    """Train the network's trainable parameters towards the original output; `by_layer` adds the outputs of `paths`."""
    teacher = deepcopy(expert.model).to(check_device(training.device))
    layer_paths = paths if by_layer else []

    def loss(student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        if expert.few_step is None:
            batch = replace(batch, t=to_uniform_times(batch.t, training))
        batch = at_few_step_times(batch, expert.few_step, training)
        targets: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        with torch.no_grad(), record_calls(teacher, layer_paths, lambda path, _, value: targets.update({path: value})):
            target = run_network(teacher, expert, batch)
        with record_calls(student, layer_paths, lambda path, _, value: outputs.update({path: value})):
            output = functional.mse_loss(run_network(student, expert, batch).float(), target)
        # Wang et al. 2025, arXiv:2402.03666: sum over layers of ||their output - before||^2 + ||output - before||^2.
        layers = torch.stack(
            [functional.mse_loss(outputs[path], targets[path]) for path in layer_paths] or [output * 0]
        )
        return {"loss": output + layers.sum(), "output": output}

    return fit(model, loss, dataset, training, workspace).model
