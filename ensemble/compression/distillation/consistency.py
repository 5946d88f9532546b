"""Consistency training and distillation of an expert, on its own noise path.

    E loss(f(x_t, t), stopped f(x_s, s)),   s the next smaller t of the discretisation,   f(x, 0) = x

x_s has the same sample and noise as x_t (training), or lies one Euler step of the expert from x_t (distillation).
Song et al. 2023, arXiv:2303.01469; Song & Dhariwal 2023, arXiv:2310.14189; Dao et al. 2025, arXiv:2502.01441: Cauchy
loss, coupling, c that follows the discretisation, a diffusion loss at early t, layer norms of fixed scale. f is the
clean estimate of the expert's velocity, whose boundary condition holds by itself: noised - t velocity, for one.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ddm_core.artifacts import Workspace
from ensemble.compression.common.alternating_trainer import Update, UpdateStep, train_alternating
from ensemble.compression.distillation.config import ConsistencyConfig
from ensemble.compression.distillation.student import predict_clean, with_network
from ensemble.compression.distillation.teacher import Teacher, frozen_copy
from ensemble.compression.method import ExpertResult
from experts.diffusion.few_step import FewStepSchedule
from experts.diffusion.noise_schedule import Latents, Times, expand
from experts.expert import Expert, network_flops
from experts.training.latent_dataset import LatentDataset, derive_seed, make_batch


def optimal_coupling(clean: Latents, noise: Latents, group: Int[Tensor, " batch"]) -> Latents:
    """The rows of `noise` in the order that brings them nearest to `clean`, within rows of equal `group`."""
    order = torch.arange(len(clean))
    costs = torch.cdist(clean.flatten(1).double(), noise.flatten(1).double()).square().cpu()
    for value in torch.unique(group).tolist():
        rows = (group == value).nonzero().squeeze(-1).cpu()
        _, columns = linear_sum_assignment(costs[rows][:, rows].numpy())
        order[rows] = rows[torch.from_numpy(columns)]
    return noise[order.to(noise.device)]


NOISE_STREAM = 8
"""Purpose of random numbers; no other training shares their stream."""

Squared = Float[Tensor, " batch"]

# rho(d^2) of the squared distance d^2: Cauchy (2502.01441, section 3.2), pseudo-Huber (2310.14189, section 3.3).
LOSSES: dict[str, Callable[[Squared, float], Squared]] = {
    "cauchy": lambda squared, c: torch.log1p(squared / (2 * c**2)),
    "pseudo_huber": lambda squared, c: (squared + c**2).sqrt() - c,
    "l2": lambda squared, c: squared,
}
"""By name: (squared distances of rows, c) to their losses."""


def train_consistency(
    expert: Expert, dataset: LatentDataset, config: ConsistencyConfig, workspace: Workspace
) -> ExpertResult:
    """A student of one expert; raises what `train_in_turns` raises."""
    teacher = frozen_copy(expert, config.training.device)
    row = network_flops(expert.model, expert.latent_shape)
    return train_consistency_student(expert, teacher, row, dataset, config, workspace)


def train_consistency_student(
    expert: Expert,
    teacher: Teacher,
    row: float,
    dataset: LatentDataset,
    config: ConsistencyConfig,
    workspace: Workspace,
) -> ExpertResult:
    """A student that begins with the expert's parameters; `row` is what the teacher's call on a row costs, in FLOPs."""
    started = time.monotonic()
    student = deepcopy(expert.model).requires_grad_(True)
    fixed = fix_scales(student) if config.fixed_scales else 0
    learned = train_alternating(
        {"student": student}, update_step(expert, teacher, dataset, config), config.training, workspace
    )
    course = FewStepSchedule.uniform(config.steps, "renoise", is_distilled=True)
    return ExpertResult(
        expert=replace(expert, model=learned.models["student"], few_step=course, cache=None),
        modules=1,
        flops=consistency_flops(network_flops(expert.model, expert.latent_shape), row, config),
        details={"losses": learned.rows, "fixed_scales": fixed, "seconds": time.monotonic() - started},
    )


def update_step(expert: Expert, teacher: Teacher, dataset: LatentDataset, config: ConsistencyConfig) -> UpdateStep:
    """The single update of a step."""
    training = config.training

    def turn(networks: Mapping[str, nn.Module], step: int) -> Iterator[Update]:
        batch = make_batch(dataset, training, step)
        if config.coupling:
            batch = replace(batch, noise=optimal_coupling(batch.clean, batch.noise, batch.condition.class_id))
        count = intervals(step, config)
        generator = torch.Generator().manual_seed(derive_seed(NOISE_STREAM, training.seed, step))
        drawn = batch.t if config.t_choice == "logit_normal" else 1 - torch.rand(len(batch.t), generator=generator)
        upper = (drawn * count).ceil().clamp(1, count)
        device = next(networks["student"].parameters()).device
        batch, t, s = batch.to(device), (upper / count).to(device), ((upper - 1) / count).to(device)
        student, path = with_network(expert, networks["student"]), expert.noise_schedule
        noised = path.add_noise(batch.clean, batch.noise, t)
        said = predict_clean(student, noised, t, batch.condition)
        with torch.no_grad():
            if config.teacher:
                slope = teacher.velocity(noised, t, batch.condition)
                neighbour = noised + expand(s - t, noised) * slope
            else:
                neighbour = path.add_noise(batch.clean, batch.noise, s)
            wanted = predict_clean(student, neighbour, s, batch.condition)
        yield "student", consistency_losses(said, wanted, batch.clean, t, count, config)

    return turn


def consistency_losses(
    said: Latents, wanted: Latents, clean: Latents, t: Times, count: int, config: ConsistencyConfig
) -> dict[str, Float[Tensor, ""]]:
    """The loss of two neighbouring points, and the distance to the sample itself at early t."""
    c = threshold(config, count, math.prod(clean.shape[1:]))
    terms = {"consistency": LOSSES[config.loss](squared(said, wanted), c).mean()}
    terms["diffusion"] = (squared(said, clean) * (t <= config.early)).mean() / math.prod(clean.shape[1:])
    whole = terms["consistency"] + config.diffusion_weight * terms["diffusion"]
    return {"loss": whole} | {name: term.detach() for name, term in terms.items()}


def squared(first: Latents, second: Latents) -> Squared:
    """Squared Euclidean distance of every row."""
    return (first.float() - second.float()).square().flatten(1).sum(1)


def intervals(step: int, config: ConsistencyConfig) -> int:
    """How many intervals t is cut into at a step; they double at equal distances until they are the finest."""
    # Song & Dhariwal 2023, arXiv:2310.14189, section 3.4: min(s_0 2^[k / K'], s_1), K' = [K / (log2 s_1/s_0 + 1)]
    stages = math.ceil(math.log2(config.finest_intervals / config.coarsest_intervals)) + 1
    stage = step * stages // config.training.steps
    return min(config.coarsest_intervals << stage, config.finest_intervals)


def threshold(config: ConsistencyConfig, count: int, entries: int) -> float:
    """c of a row: its square is the sum of those of its entries; distances of neighbours fall as 1 / count."""
    return config.c * math.sqrt(entries) * (config.coarsest_intervals / count if config.adaptive_c else 1.0)


def fix_scales(model: nn.Module) -> int:
    """Train no scale of a layer norm from now on; how many there are."""
    scales = [
        module.weight for module in model.modules() if isinstance(module, nn.LayerNorm) and module.elementwise_affine
    ]
    for scale in scales:
        scale.requires_grad_(False)
    return len(scales)


def consistency_flops(own: float, teachers: float, config: ConsistencyConfig) -> float:
    """Of the whole training, by those of a row: a call with its gradient, one without, and the teacher's."""
    rows = config.training.steps * config.training.batch_size
    return rows * ((3 + 1) * own + config.teacher * teachers)
