"""Trajectories that begin with a draft: what it is, and at which t the expert takes it up.

    x = alpha(t) draft + sigma(t) noise, then a few Euler steps;    t minimises the MMD to the cluster's own latents

Too small a t keeps the draft's mistakes, too large a one leaves more to the few steps than they can do. CAT-DM (Zeng
et al. 2024, arXiv:2311.18405), DiffusionDrive (Liao et al. 2024, arXiv:2411.15139) and Trajectory Diffuser (Huang et
al. 2024, arXiv:2407.16142) differ in their drafts.
"""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from data_partition.clustering.kmeans import fine_centroids, nearest
from ddm_core.artifacts import Preempted, Workspace
from ensemble.compression.acceleration.config import TruncateConfig
from ensemble.compression.distillation.mmd import FINE, median_kernel, squared_mmd
from ensemble.compression.method import CompressionContext, EnsembleResult, StageError
from ensemble.ensemble import ExpertModel
from ensemble.multi_network_experts import TruncatedExpert
from ensemble.solvers import noise_for, sample_few_step
from experts.architectures.draft_generators import Anchors, Autoregressive
from experts.compressed.caching.feature_cache import ExpertCache
from experts.condition import Condition
from experts.diffusion.few_step import FewStepSchedule
from experts.diffusion.noise_schedule import Latents, NoiseSource
from experts.expert import Expert
from experts.training.flops import forward_flops, training_flops
from experts.training.latent_dataset import Batch, LatentDataset
from experts.training.trainer import fit

ROUNDS = 20
"""Of k-means."""


def truncate(config: TruncateConfig, given: CompressionContext) -> EnsembleResult:
    """Every expert of the whole ensemble with a draft of its own; all begin at the t that is best in their mean.

    Raises `StageError` if there is no student though one is asked for, or if an expert is no network of its own.
    """
    given.check_noise_schedules("truncate")
    students, experts = given.ensembles(), given.ensembles(whole=True)
    latents = given.latents(sorted(experts))
    samples = sum(map(len, latents.values()))
    made, flops, curves = {}, 0.0, dict[int, dict[float, float]]()
    for number, (k, expert) in enumerate(sorted(experts.items())):
        given.workspace.report_progress(number, len(experts), unit="experts")
        if not isinstance(expert, Expert):
            raise StageError(f"truncate works on experts of their own, and expert {k} is a {type(expert).__name__}")
        draft, spent = fit_draft(expert, students[k], latents[k], config, given.workspace.part(f"draft_{k}"))
        made[k] = TruncatedExpert(
            draft=draft, refiner=replace(expert, few_step=FewStepSchedule.uniform(config.steps, "euler"))
        )
        spent += forward_flops(
            lambda one=made[k], k=k: curves.update({k: score_start_times(one, latents[k], config, given.workspace)})
        )
        flops += spent
    curve = {t: sum(curves[k][t] * len(latents[k]) / samples for k in curves) for t in next(iter(curves.values()))}
    best = config.t_start or min(curve, key=lambda t: curve[t])
    alone = {str(k): distance(one, latents[k], config, drafts_only=True) for k, one in made.items()}
    details = {"t_start": best, "squared_mmd": {str(t): value for t, value in curve.items()}}
    return EnsembleResult(
        experts={k: with_start_time(best, one) for k, one in made.items()},
        modules=len(made),
        flops=flops,
        details=details | {"squared_mmd_of_drafts": alone},
    )


def score_start_times(
    expert: TruncatedExpert, dataset: LatentDataset, config: TruncateConfig, workspace: Workspace
) -> dict[float, float]:
    """The squared MMD of samples that begin at each of the t that are tried; nothing if one is given."""
    curve = {}
    for t in config.start_time_grid if config.t_start is None else ():
        if workspace.stop_requested():
            raise Preempted("stopped while beginnings were compared; they are compared again")
        curve[t] = distance(with_start_time(t, expert), dataset, config)
    return curve


def truncated_sample(expert: TruncatedExpert, noise: NoiseSource, condition: Condition) -> Latents:
    """Clean latents: a draft, noised to where the refiner's course begins, and refined along that course."""
    refiner, kept = expert.refiner, ExpertCache(name="")
    begun = expert.initial_latents(noise, condition, refiner.noise_schedule, kept)
    course = refiner.few_step or FewStepSchedule.uniform(1, "euler")

    def velocity(noised: Latents, t: Tensor) -> Latents:
        return refiner.velocity(noised, t, condition)

    return sample_few_step(velocity, begun, course, refiner.noise_schedule, lambda step: noise(1 + step))


def with_start_time(t: float, expert: TruncatedExpert) -> TruncatedExpert:
    """The same with a course of as many steps from another t."""
    steps = len(expert.refiner.few_step.times) if expert.refiner.few_step else 1
    return replace(expert, refiner=replace(expert.refiner, few_step=FewStepSchedule.uniform(steps, "euler", start=t)))


@torch.inference_mode()
def distance(
    expert: TruncatedExpert, dataset: LatentDataset, config: TruncateConfig, *, drafts_only: bool = False
) -> float:
    """Unbiased squared MMD of samples, or of drafts alone, to latents of the cluster, which share their classes."""
    rows = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(config.seed))[: config.rows]
    real, condition = dataset.clean[rows].flatten(1), Condition(dataset.class_id[rows])
    seeds = range(config.seed, config.seed + len(rows))

    def noise(occasion: int) -> Latents:
        return noise_for(seeds, expert.latent_shape, occasion)

    drawn = (
        expert.sample_draft(noise, condition, ExpertCache(name=""))
        if drafts_only
        else truncated_sample(expert, noise, condition)
    )
    told = (condition.class_id, condition.class_id)
    return float(squared_mmd(drawn.flatten(1), real, median_kernel("rbf", real, FINE), told))


def fit_draft(
    expert: Expert, student: ExpertModel, dataset: LatentDataset, config: TruncateConfig, workspace: Workspace
) -> tuple[Expert | nn.Module, float]:
    """The draft, and the FLOPs of making it."""
    if config.draft == "student":
        if not isinstance(student, Expert) or student.few_step is None:
            raise StageError("draft=student begins with what a student draws, and there is none; add distill=…")
        return student, 0.0
    if config.draft == "expert":
        return replace(expert, few_step=FewStepSchedule.uniform(config.draft_steps, "euler")), 0.0
    if config.draft == "anchors":
        return fit_anchors(dataset, expert.num_classes, config), 0.0
    return _autoregressive(expert, dataset, config, workspace)


def fit_anchors(dataset: LatentDataset, num_classes: int, config: TruncateConfig) -> Anchors:
    """k-means centroids of the latents, with the share of each in every class, and in all in the last row."""
    flat = dataset.clean.flatten(1).float().numpy()
    count = min(config.anchors, len(flat))
    centroids = fine_centroids(np.ascontiguousarray(flat), count, ROUNDS, config.seed)
    ids = torch.from_numpy(nearest(flat, centroids))
    shares = torch.zeros(num_classes + 1, count)
    shares[-1] = torch.bincount(ids, minlength=count).float()
    is_known = dataset.class_id >= 0
    shares.index_put_((dataset.class_id[is_known], ids[is_known]), torch.ones(int(is_known.sum())), accumulate=True)
    shares = torch.where(shares.sum(1, keepdim=True) > 0, shares, shares[-1])
    means = torch.from_numpy(centroids).reshape(count, *dataset.clean.shape[1:])
    anchors: Anchors = Anchors.of(means, shares / shares.sum(1, keepdim=True))
    return anchors


def _autoregressive(
    expert: Expert, dataset: LatentDataset, config: TruncateConfig, workspace: Workspace
) -> tuple[Autoregressive, float]:
    shape = expert.latent_shape
    part = shape[0] * shape[2] if len(shape) == 3 else max(1, shape[0] // 16)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = Autoregressive(list(shape), expert.num_classes, config.width, part)

    def loss(network: nn.Module, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        index = batch.condition.embedding_index(expert.num_classes)
        return {"loss": network.loss(batch.clean, index)}  # type: ignore[operator]

    forward = forward_flops(lambda: model(torch.zeros(1, *shape), torch.zeros(1, dtype=torch.int64)))
    fitted = fit(model, loss, dataset, config.training, workspace).model
    if not isinstance(fitted, Autoregressive):
        raise TypeError(f"training a draft gave a {type(fitted).__name__}")
    return fitted, training_flops(forward, config.training.batch_size, config.training.steps)
