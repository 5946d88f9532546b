"""EcoDiff: train masks on heads and hidden units along full trajectories, then remove the units of low logits.

    min over logits of  E || z_0(masked) - z_0 ||^2 / || z_0 ||^2 + regulariser * mean sigmoid(logit)

Zhang et al. 2024, arXiv:2412.02852. Three differences: the mask of a trajectory is sampled once, so recomputed steps
use the same one. The regularizer is mean sigmoid(logit) instead of |logit|. Residual units of U-Nets are masked too.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ddm_core.artifacts import Workspace
from ensemble.compression.common.calibration_data import HELD_OUT, calibration_batches, output_error, run_network
from ensemble.compression.method import ExpertResult, StageError
from ensemble.compression.pruning.config import EcoDiffConfig
from ensemble.compression.pruning.importance import Scores, magnitude_importance, random_importance, select_units
from ensemble.compression.pruning.masked_sampling import Masks, sample_with_masks
from experts.compressed.pruning.layers import advise_pruning
from experts.compressed.pruning.units import parameters_per_unit, prunable_units, prune_units
from experts.config import TrainingConfig
from experts.expert import Expert, network_flops
from experts.training.flops import count_parameters, training_flops
from experts.training.latent_dataset import Batch, LatentDataset
from experts.training.trainer import check_device, fit

GAMMA, ZETA, BETA = -0.1, 1.1, 0.83
"""Ends of the stretched interval, and the temperature (Louizos et al. 2018, arXiv:1712.01312)."""

Gate = Float[Tensor, " unit"]


def hard_concrete(logits: Gate, uniform: Gate) -> Gate:
    """Return gates in [0, 1] from logits and uniform noise in (0, 1); a constant 1/2 means no noise."""
    # s = sigmoid((log u - log(1 - u) + logit) / beta),  gate = min(1, max(0, s (zeta - gamma) + gamma))
    concrete = torch.sigmoid((torch.logit(uniform) + logits) / BETA)
    return (concrete * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


class Gates(nn.Module):
    """Trainable gates of `count` units, one logit each."""

    def __init__(self, count: int, start: float, noise: float) -> None:
        """Set all logits to `start`; u is sampled from an interval of width `noise` in [0, 1) around 1/2."""
        super().__init__()
        self.logits = nn.Parameter(torch.full((count,), start))
        self.noise = noise

    def forward(self) -> Gate:
        """Sample all gates with torch's global generator."""
        uniform = 0.5 + self.noise * (torch.rand_like(self.logits) - 0.5)
        return hard_concrete(self.logits, uniform)


MEASURED = 32
"""Samples that measure the result, from noise that is used nowhere else."""


def prune_ecodiff(expert: Expert, dataset: LatentDataset, config: EcoDiffConfig, workspace: Workspace) -> ExpertResult:
    """Remove the units with the lowest scores; every layer keeps at least one.

    Raises `StageError` if the expert has no units or too few, and what `fit` raises.
    """
    if expert.few_step is not None:
        raise StageError(
            f"ecodiff trains masks along full trajectories, and expert {expert.cluster_id} has a few-step schedule of "
            f"{len(expert.few_step.times)} steps; set prune=laptop, or prune before distillation"
        )
    counts = prunable_units(expert.model)
    if not counts:
        raise StageError(
            f"ecodiff prunes unquantized U-Nets and transformers of diffusers and the residual network, and found no "
            f"heads or hidden units in expert {expert.cluster_id}; {advise_pruning(expert.model)}, or prune before "
            "quantization"
        )
    scores, flops = _score_units(expert, dataset, counts, config, workspace)
    remaining = select_units(expert.model, scores, config.ratio, config.by)
    pruned = replace(expert, model=deepcopy(expert.model))
    prune_units(pruned.model, remaining)
    if config.finetune is not None:
        pruned, finetune_flops = _finetune(pruned, expert, dataset, config.finetune, workspace.part("retraining"))
        flops += finetune_flops
    details = _measure(expert, pruned, dataset, config) | {
        "kept": {path: [len(units), counts[path]] for path, units in remaining.items()},
        "scores": {path: _round(score) for path, score in scores.items()},
    }
    removed = sum(counts[path] - len(units) for path, units in remaining.items())
    return ExpertResult(expert=pruned, modules=removed, flops=flops, details=details)


def _score_units(
    expert: Expert, dataset: LatentDataset, counts: Mapping[str, int], config: EcoDiffConfig, workspace: Workspace
) -> tuple[Scores, float]:
    """Return the score of each unit, and the FLOPs of computing them."""
    if config.criterion == "magnitude":
        return magnitude_importance(expert.model), 0.0
    if config.criterion == "random":
        return random_importance(counts, config.seed), 0.0
    gates = train_gates(expert, dataset, counts, config, workspace.part("masks"))
    # Each trajectory costs 4 passes per step: one of the original network, and of the masked one a forward pass, its
    # recomputation, and a backward pass to the inputs alone, which costs as much as a forward pass.
    rows = config.mask_training.steps * config.mask_training.batch_size * config.chain
    return split(gates.logits.detach(), counts), 4 * rows * network_flops(expert.model, expert.latent_shape)


def train_gates(
    expert: Expert, dataset: LatentDataset, counts: Mapping[str, int], config: EcoDiffConfig, workspace: Workspace
) -> Gates:
    """Train the gates of all units along full trajectories; a resumed training is bit-identical."""
    device = check_device(config.mask_training.device)
    frozen = replace(expert, model=deepcopy(expert.model).to(device).eval().requires_grad_(False))
    costs = _costs(expert.model, counts, config).to(device)

    def loss(gates: nn.Module, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        with torch.no_grad():
            target = sample_with_masks(frozen, {}, batch.noise, batch.condition, config.chain)
        masked = sample_with_masks(frozen, split(gates(), counts), batch.noise, batch.condition, config.chain)
        # Zhang et al. 2024, arXiv:2412.02852: || masked z_0 - z_0 ||^2 + weight * regulariser(logits),
        # here relative to || z_0 ||^2, so that one weight serves latents of any scale.
        distance = functional.mse_loss(masked, target) / target.square().mean()
        openness = (torch.sigmoid(gates.get_parameter("logits")) * costs).sum()
        return {"loss": distance + config.regulariser * openness, "distance": distance, "openness": openness}

    gates = fit(
        Gates(int(costs.numel()), config.start, config.noise), loss, dataset, config.mask_training, workspace
    ).model
    if not isinstance(gates, Gates):
        raise TypeError(f"training gates returned a {type(gates).__name__}")
    return gates


def split(units: Float[Tensor, " unit"], counts: Mapping[str, int]) -> Masks:
    """Split one value per unit into one tensor per layer."""
    return dict(zip(counts, torch.split(units, list(counts.values())), strict=True))


def _costs(model: nn.Module, counts: Mapping[str, int], config: EcoDiffConfig) -> Float[Tensor, " unit"]:
    """Return the regularizer's weight of each unit, uniform or proportional to its parameters; weights sum to 1."""
    sizes = parameters_per_unit(model)
    unit_costs = {path: float(sizes[path]) if config.by == "parameters" else 1.0 for path in counts}
    costs = torch.cat([torch.full((count,), unit_costs[path]) for path, count in counts.items()])
    return costs / costs.sum()


def _finetune(
    pruned: Expert, original: Expert, dataset: LatentDataset, training: TrainingConfig, workspace: Workspace
) -> tuple[Expert, float]:
    """Train the pruned expert to match the original's outputs; return it and the FLOPs."""
    teacher = deepcopy(original.model).to(check_device(training.device)).eval()

    def loss(student: nn.Module, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        with torch.no_grad():
            target = run_network(teacher, original, batch)
        return {"loss": functional.mse_loss(run_network(student, original, batch).float(), target.float())}

    flops = training_flops(network_flops(pruned.model, original.latent_shape), training.batch_size, training.steps)
    flops += training.batch_size * training.steps * network_flops(original.model, original.latent_shape)
    model = fit(pruned.model, loss, dataset, training, workspace).model
    return replace(pruned, model=model), flops


def _measure(original: Expert, pruned: Expert, dataset: LatentDataset, config: EcoDiffConfig) -> dict[str, Any]:
    """Return sizes, FLOPs and errors of the pruned expert, relative to the original."""
    batches = calibration_batches(dataset, MEASURED, config.seed, 1, HELD_OUT)
    with torch.no_grad():
        before, after = (
            sample_with_masks(expert, {}, batches[0].noise, batches[0].condition, config.chain)
            for expert in (original, pruned)
        )
    parameters = [count_parameters(expert.model) for expert in (original, pruned)]
    flops = [network_flops(expert.model, original.latent_shape) for expert in (original, pruned)]
    return {
        "parameters_before": parameters[0],
        "parameters_after": parameters[1],
        "flops_ratio": flops[1] / flops[0],
        "relative_l2_of_samples": float((after - before).norm() / before.norm()),
        "output_error": output_error(pruned.model, original, batches),
    }


def _round(scores: Float[Tensor, " unit"]) -> Sequence[float]:
    return [round(score, 4) for score in scores.tolist()]
