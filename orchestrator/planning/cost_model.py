"""What every stage of a graph has to do, by the stages' own formulas: floating point operations, images, rows."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_partition.clustering.kmeans import num_fine, training_rows
from data_partition.config import DataConfig, PartitionConfig
from data_partition.datasets.fashion_mnist import HELD_OUT_ROWS
from data_partition.datasets.image_folder import image_files, tree_root
from ensemble.config import EvaluationConfig, ExpertSamplesConfig, SamplingConfig, SelectionSearchConfig
from ensemble.evaluation.reference import HELD_OUT_LIMIT, NEIGHBOUR_LIMIT
from experts.config import CodecConfig
from experts.training.flops import training_flops
from orchestrator.pipeline.graph import (
    ExpertStageConfig,
    MonolithStageConfig,
    ScoreStageConfig,
    SelectionSearchStageConfig,
)
from orchestrator.pipeline.stage import Input, Stage
from orchestrator.pipeline.stage_configs import DistilledMonolithStageConfig
from orchestrator.planning.calibration import Part, Work
from orchestrator.planning.dry_run import ExtractorCost
from router.calibration.time_bins import BINS
from router.config import RouterConfig, SelectionConfig
from router.costs import forward_rows, gradient_rows, training_cost
from router.quality import MAX_IMAGES, NOISES_PER_IMAGE


@dataclass(frozen=True, slots=True, kw_only=True)
class CallsPerImage:
    """Rows that one image puts through the networks, from noise to clean."""

    expert: int
    router: int
    is_upper_bound: bool


def calls_per_image(
    sampling: SamplingConfig, num_experts: int, *, has_router: bool, is_conditional: bool
) -> CallsPerImage:
    """Of a solver, a selection other than auto, and guidance; what depends on the data is counted at its worst."""
    selection, K = sampling.selection, num_experts
    moments = _moments(sampling)
    branches = 2 if is_conditional and sampling.guidance_scale != 1 else 1
    most = min(K, max(1, math.floor(1 / selection.probability)))
    experts: dict[str, Callable[[float], int]] = {
        "full": lambda t: K,
        "top_k": lambda t: min(selection.k, K),
        "threshold": lambda t: most,
        "nucleus": lambda t: K,
        "sample": lambda t: min(selection.draws, K),
        "sticky": lambda t: 1,
        "full_then_top1": lambda t: K if t > selection.t_switch else 1,
        "threshold_then_top1": lambda t: most if t > selection.t_switch else 1,
        "full_then_sticky": lambda t: K if t > selection.t_switch else 1,
        "sticky_resample": lambda t: 1,
        "coupled_resample": lambda t: 1,
    }
    return CallsPerImage(
        expert=branches * sum(experts[selection.name](t) for t in moments),
        router=branches * _routed(selection, moments) if has_router else 0,
        is_upper_bound=K > 1 and _depends_on_data(selection),
    )


def most_expensive(candidates: Sequence[CallsPerImage], most_calls: float) -> CallsPerImage:
    """What the choice among candidates costs at worst, if `most_calls` times the fewest calls are allowed."""
    allowed = math.floor(most_calls * min(calls.expert for calls in candidates))
    return CallsPerImage(
        expert=min(allowed, max(calls.expert for calls in candidates)),
        router=max(calls.router for calls in candidates),
        is_upper_bound=len(candidates) > 1,
    )


def _routed(selection: SelectionConfig, moments: Sequence[float]) -> int:
    """How often the router is asked; a draw that is settled needs it no more."""
    early = sum(t > selection.t_switch for t in moments)
    settling = min(1, len(moments) - early)
    return {"sticky": 0, "sticky_resample": settling, "full_then_sticky": early + settling}.get(
        selection.name, len(moments)
    )


def _depends_on_data(selection: SelectionConfig) -> bool:
    return selection.name in ("threshold", "nucleus", "threshold_then_top1") or (
        selection.name == "sample" and selection.draws > 1
    )


def _moments(sampling: SamplingConfig) -> list[float]:
    """The values of t at which a velocity is asked for; Heun looks ahead in every step but the last."""
    steps = sampling.steps
    begins = [1 - step / steps for step in range(steps)]
    ahead = [1 - step / steps for step in range(1, steps)] if sampling.solver in ("heun", "flow_match_heun") else []
    return begins + ahead


UNKNOWN = Work(flops=None, parts=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetFacts:
    """What the work of all stages follows from."""

    images: int | None
    """To learn from; None if nobody can tell before they are read."""
    held_out: int | None
    row_flops: Mapping[str, float]
    """One row through an `expert`, the `router`, the codec's `decoder`, and each expert that differs."""
    extractors: Mapping[str, ExtractorCost]
    """Of the `partition`, and of each space of the scores as `score/<name>`."""
    num_experts: int
    partition: PartitionConfig


def estimate_work(graph: Sequence[Stage], facts: DatasetFacts) -> dict[str, Work]:
    """The work of every stage, by its name."""
    found: dict[str, Work] = {}
    for stage in graph:
        found[stage.name] = WORK[stage.kind](stage, facts, found)
    return found


def count_images(config: DataConfig) -> tuple[int | None, int | None]:
    """How many images there will be to learn from and to compare with; None where only reading tells."""
    total = COUNTS[config.source](config)
    if config.source == "fashion_full" and total is not None:
        return min(total, config.limit or total), HELD_OUT_ROWS
    learnable = None if total is None else round(total * (1 - config.holdout))
    known = [count for count in (learnable, config.limit) if count is not None]
    if not known:
        return None, None
    return min(known), round(min(known) * config.holdout / (1 - config.holdout))


def _files(root: Path) -> int:
    return sum(1 for _ in image_files(root, root.resolve()))


def _dataset(stage: Stage, facts: DatasetFacts, found: Mapping[str, Work]) -> Work:
    if facts.images is None or facts.held_out is None:
        return Work(flops=0.0, parts=None)
    return Work(flops=0.0, parts=(Part(speed="dataset", count=facts.images + facts.held_out),))


def _codec(stage: Stage, facts: DatasetFacts, found: Mapping[str, Work]) -> Work:
    config: CodecConfig = stage.config
    if facts.images is None:
        return UNKNOWN
    parts, flops = [Part(speed="codec", count=facts.images)], 0.0
    if config.kind == "pca_conv":
        training = config.decoder_training
        flops = training_flops(facts.row_flops["decoder"], training.batch_size, training.steps)
        parts.append(Part(speed="decoder", count=training.batch_size * training.steps))
    return Work(flops=flops, parts=tuple(parts))


def _features(stage: Stage, facts: DatasetFacts, found: Mapping[str, Work]) -> Work:
    if facts.images is None:
        return UNKNOWN
    one = facts.extractors["partition"]
    return Work(flops=facts.images * (one.flops + one.fit_flops), parts=(Part(speed="features", count=facts.images),))


def _partition(stage: Stage, facts: DatasetFacts, found: Mapping[str, Work]) -> Work:
    """As `data_partition/partition.py` counts them."""
    config, one = facts.partition, facts.extractors["partition"]
    if facts.images is None or facts.held_out is None:
        return UNKNOWN
    fine = num_fine(config.num_fine, facts.images, config.num_experts)
    rows = len(training_rows(facts.images, fine, config.seed)) * config.iterations + facts.images + facts.held_out
    flops = 2 * rows * fine * one.dimension + facts.held_out * one.flops
    return Work(flops=flops, parts=(Part(speed="partition", count=facts.images),))


def _reference(stage: Stage, facts: DatasetFacts, found: Mapping[str, Work]) -> Work:
    """As `ensemble/evaluation/reference.py` counts them: each space on as many images as are drawn, pixels on all."""
    config: EvaluationConfig = stage.config
    if facts.images is None or facts.held_out is None:
        return UNKNOWN
    flops = 0.0
    for name, one in _spaces(facts):
        most = NEIGHBOUR_LIMIT if name == "pixels" else config.num_samples
        used = min(most, facts.images) + min(HELD_OUT_LIMIT, facts.held_out)
        flops += used * one.flops + facts.images * one.fit_flops
    return Work(flops=flops, parts=(Part(speed="reference", count=facts.images + facts.held_out),))


def _expert(stage: Stage, facts: DatasetFacts, found: Mapping[str, Work]) -> Work:
    """Speeds were measured with the network of most experts; another one's time is taken to go with its FLOPs."""
    config: ExpertStageConfig = stage.config
    training, usual = config.expert.training, facts.row_flops["expert"]
    row = facts.row_flops.get(stage.name, usual)
    flops = training_flops(row, training.batch_size, training.steps)
    share = None if facts.images is None else facts.images / facts.num_experts
    return Work(flops=flops, parts=_trained("expert", round(training.batch_size * training.steps * row / usual), share))


def _router(stage: Stage, facts: DatasetFacts, found: Mapping[str, Work]) -> Work:
    """Training, temperatures, and the look at its quality with and without the class."""
    config: RouterConfig = stage.config
    flops = training_cost(config, facts.row_flops["router"], facts.num_experts)
    rows, fitted = gradient_rows(config, facts.num_experts), forward_rows(config)
    if facts.images is None or facts.held_out is None:
        return Work(flops=flops, parts=_trained("router", rows, None))
    looked_at = 2 * BINS * NOISES_PER_IMAGE * min(-(-facts.held_out // 2), MAX_IMAGES)
    trained = _trained("router", rows, facts.images + facts.held_out)
    return Work(flops=flops, parts=(*trained, Part(speed="router_row", count=fitted + looked_at)))


def _monolith(stage: Stage, facts: DatasetFacts, found: Mapping[str, Work]) -> Work:
    """With extra steps worth the router and the clustering, as in `orchestrator/pipeline/stage_kinds.py`."""
    config: MonolithStageConfig = stage.config
    training, row = config.expert.training, facts.row_flops["expert"]
    needed = [found[name].flops for name in ("features", "partition")]
    if config.router is not None:
        needed.append(training_cost(config.router, facts.row_flops["router"], config.num_experts))
        if config.router.data == "samples":
            needed.append(
                config.router.samples_per_expert * config.num_experts * (2 * config.router.sample_steps - 1) * row
            )
    if config.experts:
        ours = sum(
            training_flops(facts.row_flops.get(f"expert_{k}", row), one.training.batch_size, one.training.steps)
            for k, one in enumerate(config.experts)
        )
        needed.append(ours - training_flops(row, training.batch_size, training.steps))
    overhead = sum(flops or 0.0 for flops in needed)
    steps = training.steps + round(overhead / training_flops(row, training.batch_size, 1))
    return Work(
        flops=training_flops(row, training.batch_size, steps),
        parts=_trained("monolith", training.batch_size * steps, facts.images),
    )


def _draws(stage: Stage, facts: DatasetFacts, found: Mapping[str, Work]) -> Work:
    """As `ensemble/sampling/expert_samples.py` counts them."""
    config: ExpertSamplesConfig = stage.config
    rows = config.samples_per_expert * facts.num_experts * (2 * config.steps - 1)
    row = _mean_row(stage.inputs, facts)
    called = round(rows * row / facts.row_flops["expert"])
    return Work(flops=rows * row, parts=(Part(speed="expert_row", count=called),))


def _student(stage: Stage, facts: DatasetFacts, found: Mapping[str, Work]) -> Work:
    """Training, and one call of a teacher for every row."""
    config: DistilledMonolithStageConfig = stage.config
    training, row = config.expert.training, facts.row_flops["expert"]
    rows = training.batch_size * training.steps
    teacher = _mean_row(stage.inputs, facts)
    parts = (*_trained("monolith", rows, facts.images), Part(speed="expert_row", count=round(rows * teacher / row)))
    return Work(flops=training_flops(row, training.batch_size, training.steps) + rows * teacher, parts=parts)


def _trained(speed: str, units: int, images: float | None) -> tuple[Part, ...]:
    """Encoding, where the number of images is known, then training."""
    encoded = () if images is None else (Part(speed="encode", count=images),)
    return (*encoded, Part(speed=speed, count=units))


def _no_work(stage: Stage, facts: DatasetFacts, found: Mapping[str, Work]) -> Work:
    return Work(flops=0.0, parts=())


def _score(stage: Stage, facts: DatasetFacts, found: Mapping[str, Work]) -> Work:
    """Images of one selection; for `auto`, of the dearest that may be chosen."""
    config: ScoreStageConfig = stage.config
    images = min(config.evaluation.num_samples, facts.images or config.evaluation.num_samples)
    if "selection_search" not in stage.inputs:
        return _drawn(images, _calls(stage, config.sampling), _row_of(stage, facts), facts)
    choice: SelectionSearchConfig = stage.inputs["selection_search"].stage.config.choice
    calls = [_calls(stage, replace(config.sampling, selection=selection)) for selection in choice.candidates]
    return _drawn(images, most_expensive(calls, choice.max_calls), _row_of(stage, facts), facts)


def _choice(stage: Stage, facts: DatasetFacts, found: Mapping[str, Work]) -> Work:
    """A few images of every candidate."""
    config: SelectionSearchStageConfig = stage.config
    short, row = replace(config.sampling, steps=config.choice.steps), _row_of(stage, facts)
    trials = [
        _drawn(config.choice.num_samples, _calls(stage, replace(short, selection=selection)), row, facts)
        for selection in config.choice.candidates
    ]
    return Work(
        flops=sum(trial.flops or 0.0 for trial in trials),
        parts=tuple(part for trial in trials for part in trial.parts or ()),
        is_upper_bound=any(trial.is_upper_bound for trial in trials),
    )


def _smaller(stage: Stage, facts: DatasetFacts, found: Mapping[str, Work]) -> Work:
    """A few images of the ensemble before and after; what a method trains comes on top."""
    return _compared(stage, facts, 2 * stage.config.num_samples)


def _timing(stage: Stage, facts: DatasetFacts, found: Mapping[str, Work]) -> Work:
    """Some turns of both ensembles, and one that is not timed."""
    return _compared(stage, facts, 2 * (stage.config.turns + 1) * stage.config.num_images)


def _compared(stage: Stage, facts: DatasetFacts, images: int) -> Work:
    """So many images, as if both ensembles were whole."""
    ensemble = assembly(stage)
    calls = calls_per_image(
        stage.config.sampling,
        len(ensemble.config.expert_ids),
        has_router="router" in ensemble.inputs,
        is_conditional=False,
    )
    row = _row_of(stage, facts)
    drawn = calls.expert * row + calls.router * facts.row_flops["router"]
    parts = (
        Part(speed="expert_row", count=round(images * calls.expert * row / facts.row_flops["expert"])),
        Part(speed="router_row", count=images * calls.router),
    )
    return Work(flops=images * drawn, parts=parts, is_upper_bound=calls.is_upper_bound)


def assembly(stage: Stage) -> Stage:
    """The stage that put the ensemble together of which this one works on a smaller or the whole version."""
    given = stage.inputs["ensemble"].stage
    return given if given.kind == "ensemble" else assembly(given)


def _calls(stage: Stage, sampling: SamplingConfig) -> CallsPerImage:
    ensemble = assembly(stage)
    return calls_per_image(
        sampling,
        len(ensemble.config.expert_ids),
        has_router="router" in ensemble.inputs,
        is_conditional=stage.config.evaluation.conditional,
    )


def _row_of(stage: Stage, facts: DatasetFacts) -> float:
    return _mean_row(assembly(stage).inputs, facts)


def _mean_row(inputs: Mapping[str, Input], facts: DatasetFacts) -> float:
    """FLOPs of a row through one of the experts among the inputs, on average."""
    usual = facts.row_flops["expert"]
    rows = [facts.row_flops.get(given.stage.name, usual) for role, given in inputs.items() if role.startswith("expert")]
    return sum(rows) / len(rows) if rows else usual


def _drawn(images: int, calls: CallsPerImage, row: float, facts: DatasetFacts) -> Work:
    """Images times velocities times calls times a forward pass, and the features of the samples."""
    spaces = sum(one.flops for _, one in _spaces(facts))
    drawn = calls.expert * row + calls.router * facts.row_flops["router"]
    parts = (
        Part(speed="expert_row", count=round(images * calls.expert * row / facts.row_flops["expert"])),
        Part(speed="router_row", count=images * calls.router),
        Part(speed="score", count=images),
    )
    return Work(flops=images * (drawn + spaces), parts=parts, is_upper_bound=calls.is_upper_bound)


def _spaces(facts: DatasetFacts) -> list[tuple[str, ExtractorCost]]:
    return [(name.removeprefix("score/"), one) for name, one in facts.extractors.items() if name.startswith("score/")]


COUNTS: dict[str, Callable[[DataConfig], int | None]] = {
    "fashion": lambda config: 8000,
    "fashion_full": lambda config: 60_000,
    "digits": lambda config: 1797,
    "image_folder": lambda config: _files(tree_root(config.path)),
    "webdataset": lambda config: None,
}
"""Images of each source before any is held out."""

WORK: dict[str, Callable[[Stage, DatasetFacts, Mapping[str, Work]], Work]] = {
    "dataset": _dataset,
    "codec": _codec,
    "features": _features,
    "partition": _partition,
    "reference": _reference,
    "expert": _expert,
    "router": _router,
    "monolith": _monolith,
    "cluster_conditioned": _monolith,
    "distilled_monolith": _student,
    "init": _no_work,
    "expert_samples": _draws,
    "ensemble": _no_work,
    "selection_search": _choice,
    "prune": _smaller,
    "quantize": _smaller,
    "stitch": _smaller,
    "timing": _timing,
    "score": _score,
}
