"""Truncated sampling: start below t = 1 from a noised draft, which the expert refines in a few steps.

    x = alpha(t) draft + sigma(t) noise, then a few Euler steps;    t minimizes the MMD to held-out latents

A small t keeps the errors of the draft; a large t leaves too much work to the few steps. CAT-DM (Zeng
et al. 2024, arXiv:2311.18405), DiffusionDrive (Liao et al. 2024, arXiv:2411.15139) and Trajectory Diffuser (Huang et
al. 2024, arXiv:2407.16142) differ in their drafts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from data_partition.clustering.kmeans import assign_nearest, fit_fine_centroids
from ddm_core.artifacts import Preempted, Workspace
from ensemble.compression.acceleration.config import TruncateConfig
from ensemble.compression.acceleration.refiner_training import train_refiner
from ensemble.compression.distillation.mmd import FINE, median_kernel, squared_mmd
from ensemble.compression.method import CompressionContext, EnsembleResult, StageError
from ensemble.multi_network_experts import TruncatedExpert
from ensemble.solvers import make_noise, sample_few_step
from experts.architectures.draft_generators import Anchors, Autoregressive, PromptedAnchors
from experts.compressed.caching.feature_cache import ExpertCache
from experts.conditions.condition import Condition
from experts.diffusion.few_step import FewStepSchedule
from experts.expert import Expert
from experts.expert_model import ExpertModel
from experts.training.flops import forward_flops, training_flops
from experts.training.latent_dataset import Batch, LatentDataset
from experts.training.trainer import fit
from experts.types import Latents, NoiseSource

KMEANS_ROUNDS = 20


def truncate(config: TruncateConfig, context: CompressionContext) -> EnsembleResult:
    """Give every original expert its own draft generator, and all the start time of the best mean held-out score.

    If t = 0 is best, drafts that are experts stay unrefined; if t = 1 is best, the experts start from noise.

    Raises `StageError` if drafts need a student and there is none, if an expert is not a single network, or if no
    refinement improves drafts that are not experts.
    """
    context.check_noise_schedules("truncate")
    students, experts = context.load_experts(), context.load_experts(original=True)
    latents, held_out = (context.load_latents(sorted(experts), held_out=part) for part in (False, True))
    grid = sorted({0.0, 1.0, *(config.start_time_grid if config.t_start is None else (config.t_start,))})
    truncated, flops, scores = {}, 0.0, dict[int, dict[float, float]]()
    for number, (k, expert) in enumerate(sorted(experts.items())):
        context.workspace.report_progress(number, len(experts), unit="experts")
        if not isinstance(expert, Expert):
            raise StageError(
                f"truncate needs experts of one network each, and expert {k} is a {type(expert).__name__}; leave out "
                "accelerate"
            )
        draft, draft_flops = fit_draft(expert, students[k], latents[k], config, context.workspace.part(f"draft_{k}"))
        truncated[k] = TruncatedExpert(
            draft=draft, refiner=replace(expert, few_step=FewStepSchedule.uniform(config.steps, "euler"))
        )
        flops += draft_flops + forward_flops(
            lambda expert=truncated[k], k=k: scores.update(
                {k: score_start_times(expert, held_out[k], grid, config, context.workspace)}
            )
        )
    sizes = {k: len(held_out[k]) for k in scores}
    mean_scores = {t: sum(scores[k][t] * sizes[k] for k in scores) / sum(sizes.values()) for t in grid}
    best = config.t_start or min(mean_scores, key=lambda t: mean_scores[t])
    notes = [describe_scores(mean_scores, best, is_chosen=config.t_start is None)]
    if config.tune != "no" and 0 < best < 1:
        data = (latents, held_out)
        tuned, tuning_flops, tuned_score = _train_refiners(truncated, best, data, config, context.workspace)
        flops += tuning_flops
        is_better = tuned_score < mean_scores[best]
        truncated = tuned if is_better else truncated
        notes.append(
            f"experts trained below t = {best:g} on {config.tune}: held-out MMD {tuned_score:.4f}, "
            f"{'kept' if is_better else 'not kept'} (before {mean_scores[best]:.4f})"
        )
    details = {"t_start": best, "squared_mmd": {str(t): value for t, value in mean_scores.items()}}
    return EnsembleResult(
        experts={k: start_at(best, expert) for k, expert in truncated.items()},
        modules=len(truncated),
        flops=flops,
        details=details | {"squared_mmd_of_experts": {str(k): scores[k] for k in scores}},
        notes=tuple(notes),
    )


def _train_refiners(
    experts: Mapping[int, TruncatedExpert],
    start: float,
    data: tuple[Mapping[int, LatentDataset], Mapping[int, LatentDataset]],
    config: TruncateConfig,
    workspace: Workspace,
) -> tuple[dict[int, TruncatedExpert], float, float]:
    """Train every refiner below `start` on (latents, held-out ones); return the experts, FLOPs and the mean score."""
    (latents, held_out), tuned, flops, total = data, dict[int, TruncatedExpert](), 0.0, 0.0
    for k, expert in experts.items():
        tuned[k], expert_flops = train_refiner(expert, latents[k], start, config, workspace.part(f"refiner_{k}"))
        flops += expert_flops
        total += measure_distance(tuned[k], held_out[k], config, start=start) * len(held_out[k])
    return tuned, flops, total / sum(len(held_out[k]) for k in experts)


def describe_scores(scores: Mapping[float, float], start: float, *, is_chosen: bool) -> str:
    """Return the table of start times and the choice as one line, with a warning if the draft alone is better."""
    table = ", ".join(f"{t:g} {value:.4f}" for t, value in scores.items())
    warning = ""
    if start and scores[0.0] < scores[start]:
        warning = f"; warning: the unrefined draft is better, {scores[0.0]:.4f}"
    verb = "chosen" if is_chosen else "given"
    return f"held-out MMD by start t (0 is the draft, 1 is noise): {table}; {verb}: {start:g}{warning}"


def score_start_times(
    expert: TruncatedExpert,
    held_out: LatentDataset,
    grid: Sequence[float],
    config: TruncateConfig,
    workspace: Workspace,
) -> dict[float, float]:
    """Return the squared MMD to held-out latents of samples for each start time, 0 and 1 included if in the grid."""
    scores = {}
    for t in grid:
        if workspace.stop_requested():
            raise Preempted("stopped while start times were scored; scoring restarts")
        scores[t] = measure_distance(expert, held_out, config, start=t)
    return scores


def start_at(t: float, expert: TruncatedExpert) -> ExpertModel:
    """Return the expert that starts at t: for 0 its draft, for 1 its refiner from noise.

    Raises `StageError` for t = 0 and a draft that is not an expert.
    """
    if 0 < t < 1:
        return with_start_time(t, expert)
    if t:
        return with_start_time(t, expert).refiner
    if isinstance(expert.draft, Expert):
        return expert.draft
    raise StageError(
        "on held-out latents the drafts are better unrefined, so nothing would be sampled from the experts; train "
        "the experts longer, or remove accelerate"
    )


def sample_truncated(expert: TruncatedExpert, noise: NoiseSource, condition: Condition) -> Latents:
    """Sample clean latents: noise a draft to the first time of the refiner's few-step schedule, and refine it."""
    refiner = expert.refiner
    noised_draft = expert.initial_latents(noise, condition, refiner.noise_schedule, ExpertCache(name=""))
    few_step = refiner.few_step or FewStepSchedule.uniform(1, "euler")

    def velocity(noised: Latents, t: Tensor) -> Latents:
        return refiner.velocity(noised, t, condition)

    return sample_few_step(velocity, noised_draft, few_step, refiner.noise_schedule, lambda step: noise(1 + step))


def with_start_time(t: float, expert: TruncatedExpert) -> TruncatedExpert:
    """Return the expert with a few-step schedule of as many steps from another start time."""
    steps = len(expert.refiner.few_step.times) if expert.refiner.few_step else 1
    return replace(expert, refiner=replace(expert.refiner, few_step=FewStepSchedule.uniform(steps, "euler", start=t)))


@torch.inference_mode()
def measure_distance(expert: TruncatedExpert, dataset: LatentDataset, config: TruncateConfig, *, start: float) -> float:
    """Return the unbiased squared MMD of samples from this start time to latents of equal classes.

    0 scores the drafts alone, 1 the refiner from noise. Few latents are paired with several samples each.
    """
    rows = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(config.seed))[: config.rows]
    real, condition = dataset.clean_rows(rows).flatten(1), dataset.condition(rows)
    kernel, conditions = median_kernel("rbf", real, FINE), (condition.class_id, condition.class_id)
    distances = []
    for repeat in range(-(-config.rows // len(rows))):
        seeds = [config.seed + repeat * len(rows) + number for number in range(len(rows))]

        def noise(occasion: int, seeds: Sequence[int] = seeds) -> Latents:
            return make_noise(seeds, expert.latent_shape, occasion)

        samples = _sample_from(start, expert, noise, condition)
        distances.append(float(squared_mmd(samples.flatten(1), real, kernel, conditions)))
    return sum(distances) / len(distances)


def _sample_from(start: float, expert: TruncatedExpert, noise: NoiseSource, condition: Condition) -> Latents:
    if start == 0:
        return expert.sample_draft(noise, condition, ExpertCache(name=""))
    return sample_truncated(with_start_time(start, expert), noise, condition)


def fit_draft(
    expert: Expert, student: ExpertModel, dataset: LatentDataset, config: TruncateConfig, workspace: Workspace
) -> tuple[Expert | nn.Module, float]:
    """Build the draft generator of an expert; return it and the FLOPs of its training."""
    if config.draft == "student":
        if not isinstance(student, Expert) or student.few_step is None:
            raise StageError("accelerate.draft=student needs a few-step student, and there is none; add distill=…")
        return student, 0.0
    if config.draft == "expert":
        return replace(expert, few_step=FewStepSchedule.uniform(config.draft_steps, "euler")), 0.0
    if config.draft == "anchors":
        anchors = fit_anchors(dataset, expert.num_classes, config)
        return (anchors, 0.0) if dataset.captions is None else train_confidence(anchors, dataset, config, workspace)
    if dataset.captions is not None:
        raise StageError(
            f"accelerate.draft={config.draft} sees classes and no text; choose accelerate.draft=anchors, "
            "accelerate.draft=expert or accelerate.draft=student"
        )
    return _train_autoregressive(expert, dataset, config, workspace)


def fit_anchors(dataset: LatentDataset, num_classes: int, config: TruncateConfig) -> Anchors:
    """Fit k-means centroids to the latents, with the share of each per class; the last row is over all classes."""
    flat = dataset.clean_rows(torch.arange(len(dataset))).flatten(1).numpy()
    count = min(config.anchors, len(flat))
    centroids = fit_fine_centroids(np.ascontiguousarray(flat), count, KMEANS_ROUNDS, config.seed)
    ids = torch.from_numpy(assign_nearest(flat, centroids))
    shares = torch.zeros(num_classes + 1, count)
    shares[-1] = torch.bincount(ids, minlength=count).float()
    has_class = dataset.class_id >= 0
    shares.index_put_((dataset.class_id[has_class], ids[has_class]), torch.ones(int(has_class.sum())), accumulate=True)
    shares = torch.where(shares.sum(1, keepdim=True) > 0, shares, shares[-1])
    means = torch.from_numpy(centroids).reshape(count, *dataset.latent_shape)
    anchors: Anchors = Anchors.from_means(means, shares / shares.sum(1, keepdim=True))
    return anchors


def train_confidence(
    anchors: Anchors, dataset: LatentDataset, config: TruncateConfig, workspace: Workspace
) -> tuple[PromptedAnchors, float]:
    """Train a head that predicts the anchor from classes and texts; return anchors with it and the FLOPs."""
    classes, first = len(anchors.shares) - 1, dataset.condition(torch.arange(1))
    if first.text is None:
        raise StageError("a head for texts needs latents with captions, and these have none; use their anchors' shares")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = PromptedAnchors.from_anchors(anchors, first.text.shape[1:], config.width)

    def loss(network: nn.Module, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        condition = batch.condition
        return {"loss": network.loss(batch.clean, condition.embedding_index(classes), condition.text)}  # type: ignore[operator]

    forward = forward_flops(lambda: model.logits(first.embedding_index(classes), first.text))
    trained = fit(model, loss, dataset, config.training, workspace).model
    if not isinstance(trained, PromptedAnchors):
        raise TypeError(f"training a head of anchors returned a {type(trained).__name__}")
    return trained, training_flops(forward, config.training.batch_size, config.training.steps)


def _train_autoregressive(
    expert: Expert, dataset: LatentDataset, config: TruncateConfig, workspace: Workspace
) -> tuple[Autoregressive, float]:
    """Train the autoregressive draft network on the cluster; return it and the FLOPs."""
    shape = expert.latent_shape
    part_size = shape[0] * shape[2] if len(shape) == 3 else max(1, shape[0] // 16)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = Autoregressive(list(shape), expert.num_classes, config.width, part_size)

    def loss(network: nn.Module, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        index = batch.condition.embedding_index(expert.num_classes)
        return {"loss": network.loss(batch.clean, index)}  # type: ignore[operator]

    forward = forward_flops(lambda: model(torch.zeros(1, *shape), torch.zeros(1, dtype=torch.int64)))
    trained = fit(model, loss, dataset, config.training, workspace).model
    if not isinstance(trained, Autoregressive):
        raise TypeError(f"training a draft network returned a {type(trained).__name__}")
    return trained, training_flops(forward, config.training.batch_size, config.training.steps)
