"""SVDQuant: attention and feed-forward layers in 4 bits, with a 16-bit low-rank branch that absorbs outliers.

    x W^T ~ Q(x / s) Q(R)^T + (x / s) (U D)^T,    W diag(s) = U D + R

Li et al. 2025, arXiv:2411.05007. All other large weights are stored in few bits and compute in full precision. The
arithmetic in 4 bits is simulated: it saves bytes but no time, and changes samples as real 4-bit kernels would.
"""

from copy import deepcopy
from dataclasses import asdict, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ddm_core.artifacts import Preempted, Workspace
from ensemble.compression.common.calibration_data import (
    HELD_OUT,
    calibration_batches,
    output_error,
    record_calls,
    run_network,
    subsample_rows,
)
from ensemble.compression.common.network_stages import describe_layers
from ensemble.compression.method import ExpertResult, StageError
from ensemble.compression.quantization.config import SVDQuantConfig
from ensemble.compression.quantization.layers import pack_rest, quantizable_layers
from ensemble.compression.quantization.svd_search import SearchResult, search
from experts.expert import Expert
from experts.training.flops import forward_flops
from experts.training.latent_dataset import Batch, LatentDataset


def quantize_svdquant(
    expert: Expert, dataset: LatentDataset, config: SVDQuantConfig, workspace: Workspace
) -> ExpertResult:
    """Quantize every attention and feed-forward layer, and pack the other large weights.

    Raises `StageError` if there is no such layer, `Preempted` between two layers; a restart searches all layers again.
    """
    model = deepcopy(expert.model)
    paths = quantizable_layers(model, "attention", "feed_forward")
    time_layers = quantizable_layers(model, "time_embedding") if config.time_embedding else []
    if not paths:
        raise StageError(
            f"svdquant needs attention or feed-forward layers, and expert {expert.cluster_id} has none; set quantize "
            f"to another method (its layers: {describe_layers(model)})"
        )
    results: dict[str, SearchResult] = {}
    calibration = calibration_batches(dataset, config.rows, config.seed, 1, few_step=expert.few_step)[0]
    flops = forward_flops(
        lambda: results.update(_search_layers(expert, [*paths, *time_layers], calibration, config, workspace))
    )
    for path in paths:
        if path in results:
            model.set_submodule(path, results[path].layer)
    measuring = calibration_batches(dataset, config.rows, config.seed, 1, HELD_OUT, expert.few_step)
    error_of_layers = output_error(model, expert, measuring)
    for path in time_layers:
        if path in results:
            model.set_submodule(path, results[path].layer)
    rest = pack_rest(model, config.rest_bits, config.group_size, config.min_elements)
    details = {
        "output_error_of_layers": error_of_layers,
        "output_error": output_error(model, expert, measuring),
        "layers": {path: _layer_details(result) for path, result in results.items()},
        "mean_layer_error": fmean(result.errors[-1] for result in results.values()),
        "weights_stored_in_few_bits": rest,
    }
    return ExpertResult(expert=replace(expert, model=model), modules=len(results) + rest, flops=flops, details=details)


def _search_layers(
    expert: Expert, paths: list[str], batch: Batch, config: SVDQuantConfig, workspace: Workspace
) -> dict[str, SearchResult]:
    """Search the quantized form of every linear layer; layers that receive the time keep their activations."""
    inputs = _record_inputs(expert, paths, batch, config.tokens)
    results = {}
    for number, path in enumerate(paths):
        workspace.report_progress(number, len(paths), unit="layers")
        if workspace.stop_requested():
            raise Preempted(f"stopped after {number} of {len(paths)} layers; the search restarts from the first")
        linear = expert.model.get_submodule(path)
        if isinstance(linear, nn.Linear):
            quantizes_inputs = path in quantizable_layers(expert.model, "attention", "feed_forward")
            layer_config = config if quantizes_inputs else replace(config, activation_bits=None, smooth=False)
            results[path] = search(linear, inputs.pop(path), layer_config)
    return results


def _record_inputs(expert: Expert, paths: list[str], batch: Batch, tokens: int) -> dict[str, Tensor]:
    """Return the inputs of these layers in the original network, at most `tokens` rows each."""
    inputs: dict[str, Tensor] = {}

    def record(path: str, layer_input: Tensor, layer_output: Tensor) -> None:
        inputs[path] = subsample_rows(layer_input.detach().flatten(0, -2), tokens)

    with torch.no_grad(), record_calls(expert.model, paths, record):
        run_network(expert.model, expert, batch)
    return inputs


def _layer_details(result: SearchResult) -> dict[str, Any]:
    """Return the measurements of one layer as JSON."""
    shape = result.layer.shape
    return {
        "alpha": result.alpha,
        "error_before_refining": result.errors[0],
        "error": result.errors[-1],
        "better_turns": len(result.errors) - 1,
        "bits_a_weight": 8 * _nbytes(result.layer) / result.layer.in_features / result.layer.out_features,
    } | {key: value for key, value in asdict(shape).items() if key in ("rank", "is_unsigned")}


def _nbytes(layer: nn.Module) -> int:
    return sum(buffer.nbytes for buffer in layer.buffers())
