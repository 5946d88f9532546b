"""Fine-tuning of a pruned network on its task, the original's output and the original's features.

    L = |target - student|^2 + a |teacher - student|^2 + b sum_l w_l |f_l(teacher) - f_l(student)|^2,
    w_l = 1 / E |f_l(teacher)|^2

Zhang et al. 2024, LAPTOP-Diff, arXiv:2404.11098, section 3.3: w_l gives features of different magnitudes equal weight.
l runs over the ends of a U-Net's stages and a transformer's blocks, from the first removed layer on. A-SDM adds a
semantic supervision (Zhu et al. 2023, arXiv:2312.15516), here of the clean samples x that both networks estimate:

    c |phi(x_teacher) - phi(x_student)|^2 / E |phi(x_teacher)|^2,    phi features of the teacher
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ddm_core.artifacts import Workspace
from ensemble.compression.common.calibration_data import at_few_step_times, run_network
from ensemble.compression.common.network_stages import STAGE, image_features
from ensemble.compression.distillation.mmd_features import latent_features
from ensemble.compression.distillation.teacher import copy_frozen
from ensemble.compression.pruning.config import AssemblyConfig, LaptopConfig, RegionalConfig
from experts.config import TrainingConfig
from experts.diffusion.predictions import to_clean_and_noise, training_target
from experts.expert import Expert
from experts.training.latent_dataset import Batch, LatentDataset
from experts.training.trainer import LossFn, fit

RecoveryConfig = LaptopConfig | AssemblyConfig | RegionalConfig
"""Settings with weights of the loss's terms, and of a fine-tuning."""


def stages_behind(model: nn.Module, removed: Sequence[str]) -> list[str]:
    """Return the paths of the stages of a network that end behind its first removed layer."""
    stages = [path for path, _ in model.named_modules() if STAGE.fullmatch(path)]
    first = min(i for i, stage in enumerate(stages) if any(f"{path}.".startswith(f"{stage}.") for path in removed))
    return stages[first:]


def run_with_features(
    model: nn.Module, paths: Sequence[str], batch: Batch, expert: Expert
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the network's output, and the outputs of these stages."""
    features: dict[str, Tensor] = {}

    def recorder(path: str) -> Callable[[nn.Module, object, Tensor | tuple[Tensor, ...]], None]:
        return lambda stage, inputs, output: features.update({path: image_features(stage, output)})

    handles = [model.get_submodule(path).register_forward_hook(recorder(path)) for path in paths]
    try:
        output = run_network(model, expert, batch)
    finally:
        for handle in handles:
            handle.remove()
    return output, features


def distillation_loss(
    teacher: Expert,
    paths: Sequence[str],
    weights: Mapping[str, float],
    config: RecoveryConfig,
    training: TrainingConfig,
) -> LossFn:
    """Return the loss above for a pruned network, at the times of the teacher's few-step schedule if it has one.

    The task term is left out for a distilled teacher, whose outputs do not match its training targets.
    """
    few_step, schedule = teacher.few_step, teacher.noise_schedule
    semantic_weight = config.semantic_weight if isinstance(config, AssemblyConfig) else 0.0
    describe = latent_features("expert", teacher, config.seed, training.device) if semantic_weight else None
    has_task = few_step is None or not few_step.is_distilled

    def loss(model: nn.Module, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        batch = at_few_step_times(batch, few_step, training)
        target = training_target(teacher.prediction, batch.clean, batch.noise, batch.t, teacher.noise_schedule)
        with torch.no_grad():
            target_output, target_features = run_with_features(teacher.model, paths, batch, teacher)
        output, features = run_with_features(model, paths, batch, teacher)
        terms = {
            "task": functional.mse_loss(output.float(), target),
            "output": functional.mse_loss(output, target_output),
        }
        distances = [weights[path] * functional.mse_loss(features[path], target_features[path]) for path in paths]
        terms["features"] = torch.stack(distances).sum() if distances else output.new_zeros(())
        total = config.output_weight * terms["output"] + config.feature_weight * terms["features"]
        if describe is not None:
            noised = schedule.add_noise(batch.clean, batch.noise, batch.t)
            exact, estimate = (
                describe(to_clean_and_noise(teacher.prediction, predicted, noised, batch.t, schedule).clean)
                for predicted in (target_output, output)
            )
            terms["semantic"] = functional.mse_loss(estimate, exact) / exact.square().mean()
            total = total + semantic_weight * terms["semantic"]
        total = total + terms["task"] if has_task else total
        return {"loss": total} | {name: term.detach() for name, term in terms.items()}

    return loss


@torch.no_grad()
def feature_weights(teacher: Expert, paths: Sequence[str], batch: Batch, *, normalize: bool) -> dict[str, float]:
    """Return w_l of each stage, or 1 without normalization."""
    features = run_with_features(teacher.model, paths, batch, teacher)[1]
    return {path: float(1 / features[path].square().mean()) if normalize else 1.0 for path in paths}


def finetune_pruned(
    pruned: Expert,
    teacher: Expert,
    dataset: LatentDataset,
    batch: Batch,
    removed: Sequence[str],
    config: RecoveryConfig,
    workspace: Workspace,
) -> nn.Module:
    """Return the pruned network after fine-tuning against the original one; `batch` gives the weights of features."""
    if config.finetune is None:
        return pruned.model
    paths = stages_behind(teacher.model, removed) if config.feature_weight else []
    weights = feature_weights(teacher, paths, batch, normalize=config.normalize)
    frozen = copy_frozen(teacher, config.finetune.device)
    loss = distillation_loss(frozen, paths, weights, config, config.finetune)
    return fit(deepcopy(pruned.model), loss, dataset, config.finetune, workspace).model
