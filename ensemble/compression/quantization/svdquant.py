"""SVDQuant: attention and feed-forward layers of four bits, whose outliers a low-rank branch of sixteen bits takes.

Li et al. 2025, arXiv:2411.05007. Every other large weight is stored in few bits and computes in full precision. No
processor is quicker by it: it is bytes that are saved, and what the rounding does to samples is as it would be.
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
    record_inputs,
    run_network,
    subsample_rows,
)
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
    """Every linear layer of attention and feed-forward parts in few bits, the rest of the network stored in few.

    Raises `StageError` if there is no such layer, `Preempted` between two layers, which are then searched anew.
    """
    model = deepcopy(expert.model)
    paths = quantizable_layers(model, "attention", "feed_forward")
    told = quantizable_layers(model, "time_embedding") if config.time_embedding else []
    if not paths:
        raise StageError(
            f"svdquant found no linear layer of attention or feed-forward parts in expert {expert.cluster_id}, so it "
            "would do nothing: give the network attention, or take another stage"
        )
    found: dict[str, SearchResult] = {}
    calibrating = calibration_batches(dataset, config.rows, config.seed, 1, course=expert.few_step)[0]
    flops = forward_flops(lambda: found.update(_search_all(expert, [*paths, *told], calibrating, config, workspace)))
    for path in paths:
        if path in found:
            model.set_submodule(path, found[path].layer)
    measuring = calibration_batches(dataset, config.rows, config.seed, 1, HELD_OUT, expert.few_step)
    error_of_layers = output_error(model, expert, measuring)
    for path in told:
        if path in found:
            model.set_submodule(path, found[path].layer)
    rest = pack_rest(model, config.rest_bits, config.group_size, config.min_elements)
    details = {
        "output_error_of_layers": error_of_layers,
        "output_error": output_error(model, expert, measuring),
        "layers": {path: _described(one) for path, one in found.items()},
        "mean_layer_error": fmean(one.errors[-1] for one in found.values()),
        "weights_stored_in_few_bits": rest,
    }
    return ExpertResult(expert=replace(expert, model=model), modules=len(found) + rest, flops=flops, details=details)


def _search_all(
    expert: Expert, paths: list[str], batch: Batch, config: SVDQuantConfig, workspace: Workspace
) -> dict[str, SearchResult]:
    inputs = _inputs_of(expert, paths, batch, config.tokens)
    found = {}
    for number, path in enumerate(paths):
        workspace.report_progress(number, len(paths), unit="layers")
        if workspace.stop_requested():
            raise Preempted(f"stopped after {number} of {len(paths)} layers, which are searched again")
        linear = expert.model.get_submodule(path)
        if isinstance(linear, nn.Linear):
            rounds_inputs = path in quantizable_layers(expert.model, "attention", "feed_forward")
            own = config if rounds_inputs else replace(config, activation_bits=None, smooth=False)
            found[path] = search(linear, inputs.pop(path), own)
    return found


def _inputs_of(expert: Expert, paths: list[str], batch: Batch, tokens: int) -> dict[str, Tensor]:
    """What every layer of the whole network is given; at most so many rows each."""
    inputs: dict[str, Tensor] = {}

    def see(path: str, given: Tensor, said: Tensor) -> None:
        inputs[path] = subsample_rows(given.detach().flatten(0, -2), tokens)

    with torch.no_grad(), record_inputs(expert.model, paths, see):
        run_network(expert.model, expert, batch)
    return inputs


def _described(found: SearchResult) -> dict[str, Any]:
    shape = found.layer.shape
    return {
        "alpha": found.alpha,
        "error_before_refining": found.errors[0],
        "error": found.errors[-1],
        "better_turns": len(found.errors) - 1,
        "bits_a_weight": 8 * _nbytes(found.layer) / found.layer.in_features / found.layer.out_features,
    } | {key: value for key, value in asdict(shape).items() if key in ("rank", "is_unsigned")}


def _nbytes(layer: nn.Module) -> int:
    return sum(buffer.nbytes for buffer in layer.buffers())
