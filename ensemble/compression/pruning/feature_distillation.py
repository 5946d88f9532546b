"""What is left of a network learns from the whole one: its task, the whole one's output and its features.

    L = |target - student|^2 + a |teacher - student|^2 + b sum_l w_l |f_l(teacher) - f_l(student)|^2,
    w_l = 1 / E |f_l(teacher)|^2

Zhang et al. 2024, LAPTOP-Diff, arXiv:2404.11098, section 3.3: distances to features of very different size weigh
alike. l runs over the ends of a U-Net's stages and a transformer's blocks from the first removed layer on.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ensemble.compression.common.calibration_data import at_few_step_times
from ensemble.compression.common.network_stages import STAGE
from ensemble.compression.pruning.config import LaptopConfig
from experts.config import TrainingConfig
from experts.diffusion.predictions import training_target
from experts.expert import Expert
from experts.networks.registry import call_network
from experts.training.latent_dataset import Batch
from experts.training.trainer import LossFn


def stages_behind(model: nn.Module, removed: Sequence[str]) -> list[str]:
    """Paths of the stages of a network that end behind its first removed layer."""
    stages = [path for path, _ in model.named_modules() if STAGE.fullmatch(path)]
    first = min(i for i, stage in enumerate(stages) if any(f"{path}.".startswith(f"{stage}.") for path in removed))
    return stages[first:]


def features(model: nn.Module, paths: Sequence[str], batch: Batch, expert: Expert) -> tuple[Tensor, dict[str, Tensor]]:
    """The network's answer, and what comes out of each of these stages."""
    found: dict[str, Tensor] = {}

    def keeper(path: str) -> Callable[[nn.Module, object, Tensor | tuple[Tensor, ...]], None]:
        return lambda _, given, said: found.update({path: said if isinstance(said, Tensor) else said[0]})

    handles = [model.get_submodule(path).register_forward_hook(keeper(path)) for path in paths]
    try:
        noised = expert.noise_schedule.add_noise(batch.clean, batch.noise, batch.t)
        answer = call_network(model, noised, batch.t, batch.condition)
    finally:
        for handle in handles:
            handle.remove()
    return answer, found


def distillation_loss(
    teacher: Expert, paths: Sequence[str], weights: Mapping[str, float], config: LaptopConfig, training: TrainingConfig
) -> LossFn:
    """The loss above, for a student of this teacher; at the times of its course, and without its task if it has none.

    What was distilled does not say what data say, so that only the teacher is left to learn from.
    """
    course = teacher.few_step
    has_task = course is None or not course.is_distilled

    def loss(model: nn.Module, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        batch = at_few_step_times(batch, course, training)
        target = training_target(teacher.prediction, batch.clean, batch.noise, batch.t, teacher.noise_schedule)
        with torch.no_grad():
            exact, theirs = features(teacher.model, paths, batch, teacher)
        said, ours = features(model, paths, batch, teacher)
        terms = {"task": functional.mse_loss(said.float(), target), "output": functional.mse_loss(said, exact)}
        apart = [weights[path] * functional.mse_loss(ours[path], theirs[path]) for path in paths]
        terms["features"] = torch.stack(apart).sum() if apart else said.new_zeros(())
        learned = config.output_weight * terms["output"] + config.feature_weight * terms["features"]
        whole = learned + terms["task"] if has_task else learned
        return {"loss": whole} | {name: term.detach() for name, term in terms.items()}

    return loss


@torch.no_grad()
def feature_weights(teacher: Expert, paths: Sequence[str], batch: Batch, *, normalise: bool) -> dict[str, float]:
    """One over the mean square of the teacher's features at each stage, or one."""
    found = features(teacher.model, paths, batch, teacher)[1]
    return {path: float(1 / found[path].square().mean()) if normalise else 1.0 for path in paths}
