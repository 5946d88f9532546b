"""Consistency training and distillation: a student predicts the same clean sample from every point of a trajectory.

    E loss(f(x_t, t), stop_gradient f(x_s, s)),   s the next smaller t of the discretization,   f(x, 0) = x

x_s has the same sample and noise as x_t (training), or is one Euler step of the expert from x_t (distillation).
Song et al. 2023, arXiv:2303.01469; Song & Dhariwal 2023, arXiv:2310.14189; Dao et al. 2025, arXiv:2502.01441: Cauchy
loss, coupling, c that follows the discretization, a diffusion loss at small t, layer norms of fixed scale. f is the
clean estimate of the student's velocity, for instance noised - t velocity, which is the identity at t = 0.

Decoupled learning (AnimateLCM, Wang et al. 2024, arXiv:2402.00769): consistency is learned once for all data, and an
adapter W + up down learns what one kind of data adds, from up = 0, so that it begins as the shared student. The paper
adds a second kind of data, videos; here each cluster is one.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ddm_core.artifacts import Workspace
from ddm_core.random_bits import Stream
from ensemble.compression.common.alternating_trainer import Update, UpdateStep, train_alternating
from ensemble.compression.common.network_stages import describe_layers
from ensemble.compression.distillation.config import ConsistencyConfig
from ensemble.compression.distillation.student import predict_clean, with_network
from ensemble.compression.distillation.teacher import Teacher, copy_as_teacher
from ensemble.compression.method import ExpertResult, StageError
from experts.diffusion.few_step import FewStepSchedule
from experts.diffusion.noise_schedule import expand
from experts.expert import Expert, network_flops
from experts.networks.lora import add_new_lora, layers_above_rank, merge_lora
from experts.training.flops import count_parameters
from experts.training.latent_dataset import LatentDataset, derive_seed, make_batch
from experts.types import Latents, Times


def optimal_coupling(clean: Latents, noise: Latents, group: Int[Tensor, " batch"]) -> Latents:
    """Return the rows of `noise` in the order closest to `clean` in squared distance, within rows of equal `group`."""
    order = torch.arange(len(clean))
    costs = torch.cdist(clean.flatten(1).double(), noise.flatten(1).double()).square().cpu()
    for value in torch.unique(group).tolist():
        rows = (group == value).nonzero().squeeze(-1).cpu()
        _, columns = linear_sum_assignment(costs[rows][:, rows].numpy())
        order[rows] = rows[torch.from_numpy(columns)]
    return noise[order.to(noise.device)]


Squared = Float[Tensor, " batch"]

# rho(d^2) of the squared distance d^2: Cauchy (2502.01441, section 3.2), pseudo-Huber (2310.14189, section 3.3).
LOSSES: dict[str, Callable[[Squared, float], Squared]] = {
    "cauchy": lambda squared, c: torch.log1p(squared / (2 * c**2)),
    "pseudo_huber": lambda squared, c: (squared + c**2).sqrt() - c,
    "l2": lambda squared, c: squared,
}
"""Losses by name: (squared distances of rows, c) to their losses."""


def train_consistency(
    expert: Expert,
    dataset: LatentDataset,
    config: ConsistencyConfig,
    workspace: Workspace,
    start: nn.Module | None = None,
) -> ExpertResult:
    """Train a student of one expert, from its parameters or from `start`; raises what the training below raises."""
    teacher, teacher_flops = copy_as_teacher(expert, config.training.device)
    initial = expert if start is None else replace(expert, model=start)
    return train_consistency_student(initial, teacher, teacher_flops, dataset, config, workspace)


def train_consistency_student(
    expert: Expert,
    teacher: Teacher,
    teacher_flops: float,
    dataset: LatentDataset,
    config: ConsistencyConfig,
    workspace: Workspace,
) -> ExpertResult:
    """Train a student from the expert's parameters; `teacher_flops` are those of the teacher on one row.

    Raises `StageError` for norms or an adapter that the network has no layers for, and what `train_alternating` raises.
    """
    student = deepcopy(expert.model).requires_grad_(True)
    num_fixed = 0 if config.fixed_scales is False else freeze_scales(student)
    if config.fixed_scales and not num_fixed:
        raise StageError(
            f"distill.fixed_scales needs layer or group norms with scales, and expert {expert.cluster_id} has none; "
            f"leave it out (its layers: {describe_layers(student)})"
        )
    if config.adapter_rank is not None:
        _add_adapter(student, config.adapter_rank, expert.cluster_id, config.training.seed)
    trained_share = count_trainable(student) / count_parameters(expert.model)
    trained = train_alternating(
        {"student": student}, make_update_step(expert, teacher, dataset, config), config.training, workspace
    )
    few_step = FewStepSchedule.uniform(config.steps, "renoise", is_distilled=True)
    model = trained.models["student"]
    merge_lora(model)
    return ExpertResult(
        expert=replace(expert, model=model.requires_grad_(True), few_step=few_step, cache=None),
        modules=1,
        flops=consistency_flops(network_flops(expert.model, expert.latent_shape), teacher_flops, config),
        details={"losses": trained.rows, "fixed_scales": num_fixed, "trained_share": trained_share},
    )


def count_trainable(model: nn.Module) -> int:
    """Return the number of parameters with gradients."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _add_adapter(model: nn.Module, rank: int, cluster_id: int, seed: int) -> None:
    """Inject an adapter that changes nothing yet, in place; raise `StageError` if every layer is smaller than it."""
    layers = layers_above_rank(model, rank)
    if not layers:
        raise StageError(
            f"distill.adapter_rank={rank} is no smaller than any layer of expert {cluster_id}; lower it, or leave it "
            f"out (its layers: {describe_layers(model)})"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        add_new_lora(model, layers, rank)


def make_update_step(expert: Expert, teacher: Teacher, dataset: LatentDataset, config: ConsistencyConfig) -> UpdateStep:
    """Return the training step: a single update of the student."""
    training = config.training

    def update_step(networks: Mapping[str, nn.Module], step: int) -> Iterator[Update]:
        batch = make_batch(dataset, training, step)
        if config.coupling:
            batch = replace(batch, noise=optimal_coupling(batch.clean, batch.noise, batch.condition.class_id))
        count = interval_count(step, config)
        generator = torch.Generator().manual_seed(derive_seed(Stream.CONSISTENCY, training.seed, step))
        continuous_t = (
            batch.t if config.t_choice == "logit_normal" else 1 - torch.rand(len(batch.t), generator=generator)
        )
        upper = (continuous_t * count).ceil().clamp(1, count)
        device = next(networks["student"].parameters()).device
        batch, t, s = batch.to(device), (upper / count).to(device), ((upper - 1) / count).to(device)
        student, noise_schedule = with_network(expert, networks["student"]), expert.noise_schedule
        noised = noise_schedule.add_noise(batch.clean, batch.noise, t)
        predicted = predict_clean(student, noised, t, batch.condition)
        with torch.no_grad():
            if config.teacher:
                velocity = teacher.velocity(noised, t, batch.condition)
                neighbor = noised + expand(s - t, noised) * velocity
            else:
                neighbor = noise_schedule.add_noise(batch.clean, batch.noise, s)
            target = predict_clean(student, neighbor, s, batch.condition)
        yield "student", consistency_losses(predicted, target, batch.clean, t, count, config)

    return update_step


def consistency_losses(
    predicted: Latents, target: Latents, clean: Latents, t: Times, count: int, config: ConsistencyConfig
) -> dict[str, Float[Tensor, ""]]:
    """Return the loss of two neighboring points, and the distance to the clean sample at small t."""
    c = loss_threshold(config, count, math.prod(clean.shape[1:]))
    terms = {"consistency": LOSSES[config.loss](squared_distance(predicted, target), c).mean()}
    terms["diffusion"] = (squared_distance(predicted, clean) * (t <= config.early)).mean() / math.prod(clean.shape[1:])
    total = terms["consistency"] + config.diffusion_weight * terms["diffusion"]
    return {"loss": total} | {name: term.detach() for name, term in terms.items()}


def squared_distance(first: Latents, second: Latents) -> Squared:
    """Return the squared Euclidean distance of every row."""
    return (first.float() - second.float()).square().flatten(1).sum(1)


def interval_count(step: int, config: ConsistencyConfig) -> int:
    """Return the number of intervals of t at a training step; it doubles at equal distances up to the finest."""
    # Song & Dhariwal 2023, arXiv:2310.14189, section 3.4: min(s_0 2^[k / K'], s_1), K' = [K / (log2 s_1/s_0 + 1)]
    stages = math.ceil(math.log2(config.finest_intervals / config.coarsest_intervals)) + 1
    stage = step * stages // config.training.steps
    return min(config.coarsest_intervals << stage, config.finest_intervals)


def loss_threshold(config: ConsistencyConfig, count: int, elements: int) -> float:
    """Return c of a row, sqrt(elements) times c of an element; adaptive c falls as 1 / count, like distances do."""
    return config.c * math.sqrt(elements) * (config.coarsest_intervals / count if config.adaptive_c else 1.0)


def freeze_scales(model: nn.Module) -> int:
    """Freeze the scales of all layer, group and root-mean-square norms, in place; return their number."""
    from diffusers.models.normalization import RMSNorm  # takes longer to import than most stages need

    types = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, RMSNorm)
    norms = [module for module in model.modules() if isinstance(module, types)]
    scales = [norm.weight for norm in norms if isinstance(norm.weight, nn.Parameter)]
    for scale in scales:
        scale.requires_grad_(False)
    return len(scales)


def consistency_flops(student_flops: float, teacher_flops: float, config: ConsistencyConfig) -> float:
    """Return the FLOPs of the training, from those of a row: a call with gradient, one without, and the teacher's."""
    rows = config.training.steps * config.training.batch_size
    return rows * ((3 + 1) * student_flops + config.teacher * teacher_flops)
