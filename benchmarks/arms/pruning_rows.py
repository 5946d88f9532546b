"""Rows of `benchmarks.papers` on the removal of layers, beside the best of all sets of layers."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import torch
from torch.nn import functional

from benchmarks.arms.paper_networks import train_digits
from benchmarks.arms.paper_row import PaperRow
from ddm_core.artifacts import Workspace
from ensemble.compression.common.calibration_data import calibration_batches, run_network
from ensemble.compression.pruning.config import LaptopConfig
from ensemble.compression.pruning.laptop import prune_laptop
from experts.compressed.pruning.layers import layer_sizes, layers_disabled
from experts.config import TrainingConfig
from experts.expert import Expert
from experts.training.flops import count_parameters
from experts.training.latent_dataset import LatentDataset

MAX_SETS = 150
"""Sets of layers whose loss is measured: those of the smallest sums of single losses."""


def measure_laptop(folder: Path, kind: str) -> PaperRow:
    """Remove layers of a trained transformer, and compare with random sets of layers and with all sets."""
    expert, dataset = train_digits(kind, folder)
    config = LaptopConfig(ratio=0.3, rows=64, finetune=None, additivity_sets=40)
    workspace = Workspace.at(folder / f"laptop_{kind}")
    chosen = prune_laptop(expert, dataset, config, workspace).details
    random = [replace(config, criterion="random", additivity_sets=0, seed=seed) for seed in range(15)]
    errors = [float(prune_laptop(expert, dataset, one, workspace).details["joint_cost"]) for one in random]
    training = TrainingConfig(steps=100, batch_size=32, lr=1e-3, warmup_steps=5)
    recovered = [
        prune_laptop(
            expert, dataset, replace(config, additivity_sets=0, finetune=training, feature_weight=weight), workspace
        )
        for weight in (1.0, 0.0)
    ]
    with_features, without = (float(result.details["error_retrained"]) for result in recovered)
    rank, ratio = chosen["additivity"].spearman, chosen["joint_cost"] / min(errors)
    least, count = least_loss(expert, dataset, config, chosen["costs"])
    return PaperRow(
        paper=f"LAPTOP-Diff (2404.11098), {'MMDiT' if kind == 'mmdit' else 'DiT'}",
        says="output losses of layers are additive, so a knapsack finds the layers to remove",
        file="ensemble/compression/pruning/laptop.py",
        command="ddm compress RUN prune=laptop prune.ratio=0.3",
        criterion="Spearman ≥ .9; loss at 30 % ≤ .1 × best of 15 random sets; share ≥ .30",
        ours=(
            f"Spearman {rank:.3f}; {ratio:.3f} × the best random set, the best of {count} enumerated sets "
            f"{least / min(errors):.3f} ×; share {chosen['share']:.3f}; error after "
            f"recovery {with_features:.4f} (without features {without:.4f}, before {chosen['error_pruned']:.4f})"
        ),
        theirs="PickScore -4.0 % at 50 % of SDXL's U-Net, others -8.2 % or worse",
        differs="small transformer on digits; where no set of its few layers is below .1, no choice can meet the bar",
        holds=rank >= 0.9 and ratio <= 0.1 and chosen["share"] >= 0.3,
    )


def least_loss(
    expert: Expert, dataset: LatentDataset, config: LaptopConfig, costs: Mapping[str, float]
) -> tuple[float, int]:
    """Return the least loss of the sets that free the share and lack no layer that they could, and their number."""
    paths, total = [*costs], count_parameters(expert.model)
    sizes = layer_sizes(expert.model)

    def frees_enough(chosen: set[str]) -> bool:
        return sum(size for layers, size in sizes.items() if layers <= chosen) >= round(config.ratio * total)

    sets = (set(chosen) for count in range(1, len(paths) + 1) for chosen in combinations(paths, count))
    minimal = [one for one in sets if frees_enough(one) and not any(frees_enough(one - {path}) for path in one)]
    minimal.sort(key=lambda one: sum(costs[path] for path in one))
    batch = calibration_batches(dataset, config.rows, config.seed, 1)[0]
    with torch.no_grad():
        exact, losses = run_network(expert.model, expert, batch), []
        for chosen in minimal[:MAX_SETS]:
            with layers_disabled(expert.model, sorted(chosen)):
                losses.append(float(functional.mse_loss(run_network(expert.model, expert, batch), exact)))
    return min(losses), len(losses)


ROWS = {
    "laptop_dit": lambda folder: measure_laptop(folder, "dit"),
    "laptop_mmdit": lambda folder: measure_laptop(folder, "mmdit"),
}
"""Measurements, by the names of their rows."""
