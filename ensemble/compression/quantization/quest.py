"""QuEST: few bits for weights and activations, a grid for each time, and training for the layers that matter.

Wang et al. 2025, arXiv:2402.03666. Weights are rounded by least squared error, a scale a row, without reconstruction
of blocks. Every other large weight is stored in few bits and computes in full precision.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ddm_core.artifacts import Preempted, Workspace
from ensemble.compression.common.calibration_data import (
    HELD_OUT,
    at_few_step_times,
    calibration_batches,
    output_error,
    record_inputs,
    run_network,
    spread_evenly,
    subsample_rows,
)
from ensemble.compression.method import ExpertResult, StageError
from ensemble.compression.quantization.config import QuESTConfig
from ensemble.compression.quantization.layers import Purpose, pack_rest, quantizable_layers
from ensemble.compression.quantization.quantization_aware import (
    convert,
    exact_weight,
    fake_quantize_layers,
    learn_only,
    pack_quantized_weights,
)
from experts.compressed.quantization.activation_quant import TimestepRecorder
from experts.config import TrainingConfig
from experts.expert import Expert, network_flops
from experts.training.flops import training_flops
from experts.training.latent_dataset import Batch, LatentDataset
from experts.training.trainer import fit, usable_device

SENSITIVE: tuple[Purpose, ...] = ("attention", "feed_forward")
MEASURED = 4
"""Batches that measure the error of the whole network."""


def quantize_quest(expert: Expert, dataset: LatentDataset, config: QuESTConfig, workspace: Workspace) -> ExpertResult:
    """Layers that are told the time, of attention, feed-forward parts and residual blocks in few bits, then trained.

    Raises `StageError` if there is no such layer, `Preempted` between two steps, after saving, and what `fit` raises.
    """
    model = deepcopy(expert.model)
    paths = quantizable_layers(model, *SENSITIVE, "time_embedding", *(("convolution",) if config.convolutions else ()))
    if not paths:
        raise StageError(
            f"quest found no layer to round in expert {expert.cluster_id}, so it would do nothing: it knows those of "
            "diffusers' U-Net and transformer and of the residual network"
        )
    samples, times = _observed(model, paths, expert, dataset, config, workspace)
    fake_quantize_layers(model, samples, times, config.bits, config.activation_bits)
    measuring = calibration_batches(dataset, config.rows, config.seed, MEASURED, HELD_OUT, expert.few_step)
    errors, touched, sizes = {"calibrated": output_error(model, expert, measuring)}, set[str](), dict[str, int]()
    flops = network_flops(expert.model, expert.latent_shape)
    asked = config.times if expert.few_step is None else len(expert.few_step.times)
    spent = flops * config.rows * (asked + 3 * MEASURED)
    tunings = _tunings(model, config)
    vectors = paths if config.vectors else []
    trying = calibration_batches(dataset, config.rows, config.seed, MEASURED, config.times, expert.few_step)
    allowed = _most_sensitive(model, expert, trying, tunings, vectors, config)
    for name, training, named in tunings:
        chosen = [path for path in named if path in allowed]
        if not chosen and not vectors:
            continue
        sizes |= learn_only(model, chosen, vectors)
        touched |= set(chosen)
        model = _tuned(model, expert, dataset, chosen, training, workspace.part(name), name == "time_embedding")
        convert(model, paths)
        errors[name] = output_error(model, expert, measuring)
        spent += training_flops(flops, training.batch_size, training.steps) * 4 / 3
    share = sum(sizes.values()) / sum(parameter.numel() for parameter in expert.model.parameters())
    pack_quantized_weights(model, paths)
    rest = pack_rest(model, config.rest_bits, config.group_size, config.min_elements)
    errors["with_the_rest_in_few_bits"] = output_error(model, expert, measuring)
    details = {"output_errors": errors, "trained_share": share, "trained_layers": sorted(touched), "layers": paths}
    details |= {"weights_stored_in_few_bits": rest}
    return ExpertResult(expert=replace(expert, model=model), modules=len(paths) + rest, flops=spent, details=details)


def _observed(
    model: nn.Module,
    paths: Sequence[str],
    expert: Expert,
    dataset: LatentDataset,
    config: QuESTConfig,
    workspace: Workspace,
) -> tuple[dict[str, Float[Tensor, "grid entry"]], Float[Tensor, " grid"]]:
    """Some of what every layer is given at each calibrated time, and those times in the network's own unit."""
    seen: dict[str, list[Tensor]] = {path: [] for path in paths}
    clock, times = TimestepRecorder(), []
    even = [(number + 0.5) / config.times for number in range(config.times)]
    asked = even if expert.few_step is None else sorted(expert.few_step.times)
    batches = calibration_batches(dataset, config.rows, config.seed, len(asked))
    called: dict[str, Tensor] = {}

    def see(path: str, given: Tensor, said: Tensor) -> None:
        called[path] = subsample_rows(given.detach().flatten().float(), config.entries)

    handle = model.register_forward_pre_hook(clock, with_kwargs=True)
    with torch.no_grad(), record_inputs(model, paths, see):
        for number, (t, batch) in enumerate(zip(asked, batches, strict=True)):
            if workspace.stop_requested():
                raise Preempted(f"stopped after {number} of {len(asked)} times, which are calibrated again")
            run_network(model, expert, replace(batch, t=torch.full_like(batch.t, t)))
            times.append(clock.now)
            for path, found in called.items():
                seen[path].append(found)
    handle.remove()
    samples = {path: torch.stack(found) for path, found in seen.items()}
    known = torch.stack([now[0].float() for now in times if now is not None])
    if config.timewise:
        return samples, known
    return {path: found.reshape(1, -1) for path, found in samples.items()}, known.mean().reshape(1)


def _tunings(model: nn.Module, config: QuESTConfig) -> list[tuple[str, TrainingConfig, list[str]]]:
    """The trainings that are asked for: name, recipe and layers."""
    told = quantizable_layers(model, "time_embedding")
    is_wide = config.convolutions and config.sensitive_convolutions
    purposes: tuple[Purpose, ...] = (*SENSITIVE, "convolution") if is_wide else SENSITIVE
    sensitive = [path for path in quantizable_layers(model, *purposes) if not path.endswith("to_out.0")]
    asked = (("time_embedding", config.time_embedding, told), ("sensitive", config.sensitive, sensitive))
    return [(name, training, paths) for name, training, paths in asked if training is not None and paths]


def _most_sensitive(
    model: nn.Module,
    expert: Expert,
    batches: Sequence[Batch],
    tunings: Sequence[tuple[str, TrainingConfig, list[str]]],
    vectors: Sequence[str],
    config: QuESTConfig,
) -> set[str]:
    """The layers whose weights are trained: those of the largest mean squared gradient, as far as the share goes.

    A small step along the gradient lowers the output's error by its squared norm, so this is gain a parameter.
    """
    paths = [path for _, _, named in tunings for path in named]
    if not paths:
        return set()
    trial = deepcopy(model)
    left = config.trained_share * sum(parameter.numel() for parameter in expert.model.parameters())
    left -= sum(learn_only(trial, [], vectors).values())
    learn_only(trial, paths)
    for batch in batches:
        with torch.no_grad():
            wanted = run_network(expert.model, expert, batch)
        functional.mse_loss(run_network(trial, expert, batch).float(), wanted).backward()  # type: ignore[no-untyped-call]
    exact = {path: exact_weight(trial, path) for path in paths}
    gains = {path: float(weight.grad.square().mean()) for path, weight in exact.items() if weight.grad is not None}
    chosen = set()
    for path in sorted(gains, key=lambda path: -gains[path]):
        if exact[path].numel() <= left:
            chosen.add(path)
            left -= exact[path].numel()
    return chosen


def _tuned(
    model: nn.Module,
    expert: Expert,
    dataset: LatentDataset,
    paths: list[str],
    training: TrainingConfig,
    workspace: Workspace,
    by_layer: bool,
) -> nn.Module:
    """The network after what learns in it has; `by_layer` holds these layers to what they said, besides the network."""
    teacher = deepcopy(expert.model).to(usable_device(training.device))
    watched_paths = paths if by_layer else []

    def loss(student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        if expert.few_step is None:
            batch = replace(batch, t=spread_evenly(batch.t, training))
        batch = at_few_step_times(batch, expert.few_step, training)
        exact: dict[str, Tensor] = {}
        said: dict[str, Tensor] = {}
        with torch.no_grad(), record_inputs(teacher, watched_paths, lambda path, _, found: exact.update({path: found})):
            wanted = run_network(teacher, expert, batch)
        with record_inputs(student, watched_paths, lambda path, _, found: said.update({path: found})):
            output = functional.mse_loss(run_network(student, expert, batch).float(), wanted)
        # Wang et al. 2025, arXiv:2402.03666: sum over layers of ||their output - before||^2 + ||output - before||^2.
        layers = torch.stack([functional.mse_loss(said[path], exact[path]) for path in watched_paths] or [output * 0])
        return {"loss": output + layers.sum(), "output": output}

    return fit(model, loss, dataset, training, workspace).model
