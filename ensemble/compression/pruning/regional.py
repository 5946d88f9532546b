"""Replace self-attention over large maps by attention to regions and summaries, and distil the original's output.

The layers are chosen by their kind, whatever the class of the network: U-Nets with attention, DiT, PixArt, MMDiT. The
equation is in `experts/compressed/attention/regional.py`; A-SDM, Zhu et al. 2023, arXiv:2312.15516.
"""

import math
from copy import deepcopy
from dataclasses import replace
from typing import Any

from ddm_core.artifacts import Workspace
from ensemble.compression.common.calibration_data import HELD_OUT, calibration_batches, output_error, run_network
from ensemble.compression.common.network_stages import describe_layers
from ensemble.compression.method import ExpertResult, StageError
from ensemble.compression.pruning.config import RegionalConfig
from ensemble.compression.pruning.feature_distillation import finetune_pruned
from experts.compressed.attention.regional import NAME, add_regional_summary, attention_maps
from experts.compressed.pruning.layers import advise_pruning
from experts.expert import Expert, network_flops
from experts.training.flops import training_flops
from experts.training.latent_dataset import Batch, LatentDataset


def prune_regional(
    expert: Expert, dataset: LatentDataset, config: RegionalConfig, workspace: Workspace
) -> ExpertResult:
    """Divide the maps of every large self-attention into regions, and train the network against the expert.

    Raises `StageError` if no layer attends to a map of `config.min_tokens` that regions make cheaper; `Preempted`.
    """
    batch = calibration_batches(dataset, config.rows, config.seed, 1, few_step=expert.few_step)[0]
    measuring = calibration_batches(dataset, config.rows, config.seed, 2, HELD_OUT, expert.few_step)
    model, settings = deepcopy(expert.model), choose_regions(expert, batch, config)
    for path, entry in settings.items():
        add_regional_summary(model, f"{path}.{NAME}", entry)
    row_flops = network_flops(expert.model, expert.latent_shape)
    divided, flops = replace(expert, model=model), (config.rows * 4 + len(settings)) * row_flops
    details: dict[str, Any] = {
        "layers": settings,
        "keys": {path: key_share(entry) for path, entry in settings.items()},
        "flops": network_flops(model, expert.latent_shape) / row_flops,
        "error_divided": output_error(model, expert, measuring),
    }
    if config.finetune is not None:
        tuned = finetune_pruned(divided, expert, dataset, batch, list(settings), config, workspace)
        divided, rows = replace(expert, model=tuned), config.finetune.batch_size * config.finetune.steps
        flops += training_flops(row_flops, config.finetune.batch_size, config.finetune.steps) + rows * row_flops
        details["error_finetuned"] = output_error(tuned, expert, measuring)
    return ExpertResult(expert=divided, modules=len(settings), flops=flops, details=details)


def choose_regions(expert: Expert, batch: Batch, config: RegionalConfig) -> dict[str, dict[str, int]]:
    """Return the settings of the layers that are divided, by their paths; raise `StageError` if there are none."""
    maps = _maps_of(expert, batch)
    chosen = dict[str, dict[str, int]]()
    for path, (heads, height, width) in maps.items():
        sides = [side for side in range(2, math.gcd(height, width)) if not (height % side or width % side)]
        if config.region is not None:
            sides = [side for side in sides if side == config.region]
        if height * width >= config.min_tokens and sides:
            side = min(sides, key=lambda side: side**2 + height * width / side**2)
            chosen[path] = {"heads": heads, "height": height, "width": width, "region": side}
    if not chosen:
        found = ", ".join(f"{path} {height} x {width}" for path, (_, height, width) in maps.items())
        raise StageError(
            f"prune=regional needs self-attention over at least {config.min_tokens} tokens that squares of side "
            f"{config.region or 2} or more divide; expert {expert.cluster_id} has {found or 'no map of attention'}; "
            f"change prune.min_tokens or prune.region, or {advise_pruning(expert.model)} (its layers: "
            f"{describe_layers(expert.model)})"
        )
    return chosen


def key_share(entry: dict[str, int]) -> float:
    """Return the keys that a query reads over those of the whole map."""
    count, members = entry["height"] * entry["width"], entry["region"] ** 2
    return (members + count / members) / count


def _maps_of(expert: Expert, batch: Batch) -> dict[str, tuple[int, int, int]]:
    shape = expert.latent_shape
    if len(shape) != 3:
        return {}
    row: Batch = batch.rows(slice(0, 1))
    return attention_maps(expert.model, lambda: run_network(expert.model, expert, row), (shape[1], shape[2]))
