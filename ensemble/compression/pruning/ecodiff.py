"""EcoDiff: masks on heads and hidden units, learned through whole trajectories; what they shut is then taken out.

Zhang et al. 2024, arXiv:2412.02852. Differs in three ways: the mask of a trajectory is drawn once and also holds when a
step is computed again, the regulariser is the mean of sigmoid(logit) instead of |logit|, and units of a U-Net's
residual blocks are masked too.
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
from experts.compressed.pruning.units import parameters_per_unit, prunable_units, prune_units
from experts.config import TrainingConfig
from experts.expert import Expert, network_flops
from experts.training.flops import training_flops
from experts.training.latent_dataset import Batch, LatentDataset
from experts.training.trainer import fit, usable_device

GAMMA, ZETA, BETA = -0.1, 1.1, 0.83
"""Ends of the stretched interval, and the temperature."""

Gate = Float[Tensor, " unit"]


def hard_concrete(logits: Gate, uniform: Gate) -> Gate:
    """Gates in [0, 1] of logits and of noise in (0, 1); noise of 1/2 everywhere is no noise."""
    # s = sigmoid((log u - log(1 - u) + logit) / beta),  gate = min(1, max(0, s (zeta - gamma) + gamma))
    concrete = torch.sigmoid((torch.logit(uniform) + logits) / BETA)
    return (concrete * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


class Gates(nn.Module):
    """A logit for each of `count` units."""

    def __init__(self, count: int, start: float, noise: float) -> None:
        """`noise` in [0, 1) is the width of the interval around 1/2 that u is drawn from."""
        super().__init__()
        self.logits = nn.Parameter(torch.full((count,), start))
        self.noise = noise

    def forward(self) -> Gate:
        """One draw of all gates, from torch's global generator."""
        uniform = 0.5 + self.noise * (torch.rand_like(self.logits) - 0.5)
        return hard_concrete(self.logits, uniform)


MEASURED = 32
"""Samples that measure what was done, on noise of their own."""


def prune_ecodiff(expert: Expert, dataset: LatentDataset, config: EcoDiffConfig, workspace: Workspace) -> ExpertResult:
    """The expert without the units that matter least; every layer keeps one at least.

    Raises `StageError` if it has no units or too few, and what `fit` raises.
    """
    if expert.few_step is not None:
        raise StageError(
            f"ecodiff learns along whole trajectories, and expert {expert.cluster_id} has a course of "
            f"{len(expert.few_step.times)} steps; take prune=laptop, or prune before"
        )
    counts = prunable_units(expert.model)
    if not counts:
        raise StageError(
            f"ecodiff found no heads or hidden units in expert {expert.cluster_id}, so it would do nothing: it knows "
            "those of diffusers' U-Net and transformer and of the residual network, before they are quantized"
        )
    scores, spent = _scores(expert, dataset, counts, config, workspace)
    kept = select_units(expert.model, scores, config.ratio, config.by)
    smaller = replace(expert, model=deepcopy(expert.model))
    prune_units(smaller.model, kept)
    if config.finetune is not None:
        smaller, flops = _retrained(smaller, expert, dataset, config.finetune, workspace.part("retraining"))
        spent += flops
    details = _details(expert, smaller, dataset, config) | {
        "kept": {path: [len(units), counts[path]] for path, units in kept.items()},
        "scores": {path: _rounded(score) for path, score in scores.items()},
    }
    removed = sum(counts[path] - len(units) for path, units in kept.items())
    return ExpertResult(expert=smaller, modules=removed, flops=spent, details=details)


def _scores(
    expert: Expert, dataset: LatentDataset, counts: Mapping[str, int], config: EcoDiffConfig, workspace: Workspace
) -> tuple[Scores, float]:
    """What each unit is worth, and the FLOPs of finding out."""
    if config.criterion == "magnitude":
        return magnitude_importance(expert.model), 0.0
    if config.criterion == "random":
        return random_importance(counts, config.seed), 0.0
    gates = learn_gates(expert, dataset, counts, config, workspace.part("masks"))
    # A trajectory is drawn by the whole network and by the masked one, each of whose steps is computed again for a
    # backward pass to the inputs alone, which costs another forward pass.
    rows = config.mask_training.steps * config.mask_training.batch_size * config.chain
    return split(gates.logits.detach(), counts), 4 * rows * network_flops(expert.model, expert.latent_shape)


def learn_gates(
    expert: Expert, dataset: LatentDataset, counts: Mapping[str, int], config: EcoDiffConfig, workspace: Workspace
) -> Gates:
    """Gates of all units, learned through whole trajectories; resumed bit for bit from the workspace."""
    device = usable_device(config.mask_training.device)
    frozen = replace(expert, model=deepcopy(expert.model).to(device).eval().requires_grad_(False))
    costs = _costs(expert.model, counts, config).to(device)

    def loss(gates: nn.Module, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        with torch.no_grad():
            wanted = sample_with_masks(frozen, {}, batch.noise, batch.condition, config.chain)
        found = sample_with_masks(frozen, split(gates(), counts), batch.noise, batch.condition, config.chain)
        # Zhang et al. 2024, arXiv:2412.02852: || masked z_0 - z_0 ||^2 + weight * regulariser(logits),
        # here relative to || z_0 ||^2, so that one weight serves latents of any scale.
        distance = functional.mse_loss(found, wanted) / wanted.square().mean()
        openness = (torch.sigmoid(gates.get_parameter("logits")) * costs).sum()
        return {"loss": distance + config.regulariser * openness, "distance": distance, "openness": openness}

    gates = fit(
        Gates(int(costs.numel()), config.start, config.noise), loss, dataset, config.mask_training, workspace
    ).model
    if not isinstance(gates, Gates):
        raise TypeError(f"training gates gave a {type(gates).__name__}")
    return gates


def split(units: Float[Tensor, " unit"], counts: Mapping[str, int]) -> Masks:
    """One number a unit, cut into the layers' own."""
    return dict(zip(counts, torch.split(units, list(counts.values())), strict=True))


def _costs(model: nn.Module, counts: Mapping[str, int], config: EcoDiffConfig) -> Float[Tensor, " unit"]:
    """What the regulariser asks for a unit, in all 1: the same for each, or by its parameters."""
    sizes = parameters_per_unit(model)
    one = {path: float(sizes[path]) if config.by == "parameters" else 1.0 for path in counts}
    costs = torch.cat([torch.full((count,), one[path]) for path, count in counts.items()])
    return costs / costs.sum()


def _retrained(
    smaller: Expert, whole: Expert, dataset: LatentDataset, training: TrainingConfig, workspace: Workspace
) -> tuple[Expert, float]:
    """The smaller expert after it has learned from the whole one, and the FLOPs of that."""
    teacher = deepcopy(whole.model).to(usable_device(training.device)).eval()

    def loss(student: nn.Module, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        with torch.no_grad():
            wanted = run_network(teacher, whole, batch)
        return {"loss": functional.mse_loss(run_network(student, whole, batch).float(), wanted.float())}

    flops = training_flops(network_flops(smaller.model, whole.latent_shape), training.batch_size, training.steps)
    flops += training.batch_size * training.steps * network_flops(whole.model, whole.latent_shape)
    model = fit(smaller.model, loss, dataset, training, workspace).model
    return replace(smaller, model=model), flops


def _details(whole: Expert, smaller: Expert, dataset: LatentDataset, config: EcoDiffConfig) -> dict[str, Any]:
    batches = calibration_batches(dataset, MEASURED, config.seed, 1, HELD_OUT)
    with torch.no_grad():
        before, after = (
            sample_with_masks(expert, {}, batches[0].noise, batches[0].condition, config.chain)
            for expert in (whole, smaller)
        )
    counted = [sum(parameter.numel() for parameter in expert.model.parameters()) for expert in (whole, smaller)]
    flops = [network_flops(expert.model, whole.latent_shape) for expert in (whole, smaller)]
    return {
        "parameters_before": counted[0],
        "parameters_after": counted[1],
        "flops_ratio": flops[1] / flops[0],
        "relative_l2_of_samples": float((after - before).norm() / before.norm()),
        "output_error": output_error(smaller.model, whole, batches),
    }


def _rounded(scores: Float[Tensor, " unit"]) -> Sequence[float]:
    return [round(score, 4) for score in scores.tolist()]
