"""The work of every stage of a graph, by the stages' own formulas: floating point operations, images, rows.

`config/stage_kinds.py` maps each kind of stage to one `estimate_…` function of this file.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_partition.clustering.kmeans import choose_num_fine, choose_training_rows
from data_partition.config import DataConfig, PartitionConfig
from data_partition.datasets.fashion_mnist import HELD_OUT_ROWS
from data_partition.datasets.image_folder import check_root, iter_image_files
from data_partition.datasets.parquet_source import list_rows
from data_partition.features.fit_sample import count_fit_images
from ensemble.compression.config import AnyDistillConfig, CompressionConfig
from ensemble.compression.distillation.config import MMDConfig, WarmedConfig
from ensemble.compression.distillation.consistency import consistency_flops
from ensemble.compression.distillation.mean_flow import mean_flow_flops
from ensemble.compression.distillation.scm import scm_flops
from ensemble.compression.distillation.sid import sid_flops
from ensemble.compression.distillation.sign import sign_flops
from ensemble.compression.distillation.speedup import speedup_flops
from ensemble.config import EvaluationConfig, ExpertSamplesConfig, SamplingConfig, SelectionSearchConfig, count_repeats
from ensemble.evaluation.reference import MAX_HELD_OUT, MAX_PROBE_IMAGES, PROBE
from experts.codecs.registry import CODECS
from experts.config import CodecConfig
from experts.training.flops import training_flops
from orchestrator.config.finetune import AdapterStageConfig
from orchestrator.config.stage_kinds import STAGE_KINDS
from orchestrator.pipeline.stage import Input, Stage
from orchestrator.pipeline.stage_configs import (
    DistilledMonolithStageConfig,
    ExpertStageConfig,
    LatentsStageConfig,
    MonolithStageConfig,
    ScoreStageConfig,
    SelectionSearchStageConfig,
)
from orchestrator.planning.calibration import Part, Work
from orchestrator.planning.dry_run import ExtractorCost
from orchestrator.planning.sampling_calls import CallsPerImage, calls_per_image, most_expensive
from router.calibration.time_bins import BINS
from router.config import RouterConfig
from router.costs import count_forward_rows, count_gradient_rows, max_quality_images, text_prior_cost, training_cost
from router.quality import NOISES_PER_IMAGE

UNKNOWN = Work(flops=None, parts=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetFacts:
    """The numbers from which the work of all stages follows."""

    images: int | None
    """Training images; None if only reading the source reveals their number."""
    held_out: int | None
    row_flops: Mapping[str, float]
    """FLOPs of one row through an `expert`, the `router`, the codec's `decoder`, each expert that differs, and the
    `text` encoder."""
    extractors: Mapping[str, ExtractorCost]
    """Of the `partition`, and of each feature space of the scores as `score/<name>`."""
    num_experts: int
    partition: PartitionConfig
    pooled_width: int = 0
    """Features of a text's pooled vector; 0 is no text."""
    num_classes: int = 0
    """Classes that models read."""


EarlierWork = Mapping[str, Work]
"""Work of the stages before a stage, by name."""


def estimate_work(graph: Sequence[Stage], facts: DatasetFacts) -> dict[str, Work]:
    """Estimate the work of every stage, by its name."""
    work: dict[str, Work] = {}
    for stage in graph:
        estimate: Callable[[Stage, DatasetFacts, EarlierWork], Work] = STAGE_KINDS[stage.kind].estimate
        work[stage.name] = estimate(stage, facts, work)
    return work


def count_images(config: DataConfig) -> tuple[int | None, int | None]:
    """Count training and held-out images; None where only reading the source reveals the number."""
    total = SOURCE_COUNTS[config.source](config)
    if config.source == "fashion_full" and total is not None:
        return min(total, config.limit or total), HELD_OUT_ROWS
    train = None if total is None else round(total * (1 - config.holdout))
    limits = [count for count in (train, config.limit) if count is not None]
    if not limits:
        return None, None
    return min(limits), round(min(limits) * config.holdout / (1 - config.holdout))


def _count_files(root: Path) -> int:
    return sum(1 for _ in iter_image_files(root, root.resolve()))


SOURCE_COUNTS: dict[str, Callable[[DataConfig], int | None]] = {
    "fashion": lambda config: 8000,
    "emoji": lambda config: 3812,
    "fashion_full": lambda config: 60_000,
    "digits": lambda config: 1797,
    "image_folder": lambda config: _count_files(check_root(config.path)),
    "webdataset": lambda config: None,
    "parquet": lambda config: sum(1 for _ in list_rows(config.path)),
}
"""Images of each source before any is held out."""


def estimate_nothing(stage: Stage, facts: DatasetFacts, earlier: EarlierWork) -> Work:
    """Return no work, for stages whose time is negligible."""
    return Work(flops=0.0, parts=())


def estimate_dataset(stage: Stage, facts: DatasetFacts, earlier: EarlierWork) -> Work:
    """Count the images that are read and written."""
    if facts.images is None or facts.held_out is None:
        return Work(flops=0.0, parts=None)
    return Work(flops=0.0, parts=(Part(speed="dataset", count=facts.images + facts.held_out),))


def estimate_codec(stage: Stage, facts: DatasetFacts, earlier: EarlierWork) -> Work:
    """Count the images of the fit, and the training of an autoencoder."""
    config: CodecConfig = stage.config
    if facts.images is None:
        return UNKNOWN
    fit = Part(speed="codec", count=facts.images)
    if CODECS[config.kind].probe is None:
        return Work(flops=0.0, parts=(fit,))
    training = estimate_decoder(stage, facts, earlier)
    return replace(training, parts=(fit, *(training.parts or ())))


def estimate_decoder(stage: Stage, facts: DatasetFacts, earlier: EarlierWork) -> Work:
    """Count the training of the codec's network."""
    training = stage.config.decoder_training
    flops = training_flops(facts.row_flops["decoder"], training.batch_size, training.steps)
    return Work(flops=flops, parts=(Part(speed="decoder", count=training.batch_size * training.steps),))


def estimate_latents(stage: Stage, facts: DatasetFacts, earlier: EarlierWork) -> Work:
    """Count the images that are encoded, and the FLOPs of the text encoder on one caption each, not of a codec."""
    config: LatentsStageConfig = stage.config
    row = facts.row_flops.get("text", 0.0) if config.text.stored_as == "encodings" else 0.0
    if facts.images is None or facts.held_out is None:
        return UNKNOWN if row else Work(flops=0.0, parts=None)
    count = facts.images + facts.held_out
    return Work(flops=count * row, parts=(Part(speed="latents", count=count),))


def estimate_features(stage: Stage, facts: DatasetFacts, earlier: EarlierWork) -> Work:
    """Count the images through the extractor."""
    if facts.images is None:
        return UNKNOWN
    extractor = facts.extractors["partition"]
    flops = facts.images * extractor.flops + count_fit_images(facts.images) * extractor.fit_flops
    return Work(flops=flops, parts=(Part(speed="features", count=facts.images),))


def estimate_partition(stage: Stage, facts: DatasetFacts, earlier: EarlierWork) -> Work:
    """Count the distances of k-means, as `data_partition/partition.py` does."""
    config, extractor = facts.partition, facts.extractors["partition"]
    if facts.images is None or facts.held_out is None:
        return UNKNOWN
    fine = choose_num_fine(config.num_fine, facts.images, config.num_experts)
    rows = (
        len(choose_training_rows(facts.images, fine, config.seed)) * config.iterations + facts.images + facts.held_out
    )
    flops = 2 * rows * fine * extractor.dimension + facts.held_out * extractor.flops
    return Work(flops=flops, parts=(Part(speed="partition", count=facts.images),))


def estimate_reference(stage: Stage, facts: DatasetFacts, earlier: EarlierWork) -> Work:
    """Count the images per feature space, as `ensemble/evaluation/reference.py` does; held-out ones twice."""
    config: EvaluationConfig = stage.config
    if facts.images is None or facts.held_out is None:
        return UNKNOWN
    flops = 0.0
    for name, extractor in _score_extractors(facts):
        limit = MAX_PROBE_IMAGES if name == PROBE else config.num_samples
        rows = min(limit, facts.images) + 2 * min(MAX_HELD_OUT, facts.held_out)
        flops += rows * extractor.flops + count_fit_images(facts.images) * extractor.fit_flops
    return Work(flops=flops, parts=(Part(speed="reference", count=facts.images + facts.held_out),))


def estimate_expert(stage: Stage, facts: DatasetFacts, earlier: EarlierWork) -> Work:
    """Count the training; the time of an expert that differs is scaled by its FLOPs, since only one was measured."""
    config: ExpertStageConfig = stage.config
    training, measured_row = config.expert.training, facts.row_flops["expert"]
    row = facts.row_flops.get(stage.name, measured_row)
    flops = training_flops(row, training.batch_size, training.steps)
    units = round(training.batch_size * training.steps * row / measured_row)
    return Work(flops=flops, parts=(Part(speed="expert", count=units),))


def estimate_adapter(stage: Stage, facts: DatasetFacts, earlier: EarlierWork) -> Work:
    """Count the training as that of the expert, whose gradients pass through all layers."""
    config: AdapterStageConfig = stage.config
    row = facts.row_flops.get(stage.inputs["expert"].stage.name, facts.row_flops["expert"])
    rows = config.training.batch_size * config.training.steps
    units = round(rows * row / facts.row_flops["expert"])
    flops = training_flops(row, config.training.batch_size, config.training.steps)
    return Work(flops=flops, parts=(Part(speed="expert", count=units),))


def estimate_router(stage: Stage, facts: DatasetFacts, earlier: EarlierWork) -> Work:
    """Count the training, the temperatures, and the measurement of its quality with and without the class."""
    config: RouterConfig = stage.config
    flops = _router_flops(config, facts)
    rows, calibration_rows = count_gradient_rows(config, facts.num_experts), count_forward_rows(config)
    training = Part(speed="router", count=rows)
    if facts.held_out is None:
        return Work(flops=flops, parts=(training,))
    images = min(-(-facts.held_out // 2), max_quality_images(config, facts.num_experts))
    quality_rows = 2 * BINS * NOISES_PER_IMAGE * images
    return Work(flops=flops, parts=(training, Part(speed="router_row", count=calibration_rows + quality_rows)))


def _router_flops(config: RouterConfig, facts: DatasetFacts) -> float:
    prior = text_prior_cost(facts.images or 0, facts.pooled_width, facts.num_classes, facts.num_experts)
    return training_cost(config, facts.row_flops["router"], facts.num_experts) + prior


def estimate_monolith(stage: Stage, facts: DatasetFacts, earlier: EarlierWork) -> Work:
    """Count the training with the extra steps of `orchestrator/pipeline/flop_matching.py`."""
    config: MonolithStageConfig = stage.config
    training, row = config.expert.training, facts.row_flops["expert"]
    extra = [earlier[name].flops for name in ("features", "partition")]
    if config.router is not None:
        extra.append(_router_flops(config.router, facts))
        if config.router.data == "samples":
            samples = config.router.samples_per_expert * config.num_experts
            extra.append(samples * (2 * config.router.sample_steps - 1) * row)
    if config.experts:
        experts = sum(
            training_flops(facts.row_flops.get(f"expert_{k}", row), expert.training.batch_size, expert.training.steps)
            for k, expert in enumerate(config.experts)
        )
        extra.append(experts - training_flops(row, training.batch_size, training.steps))
    extra_flops = sum(flops or 0.0 for flops in extra)
    steps = training.steps + round(extra_flops / training_flops(row, training.batch_size, 1))
    return Work(
        flops=training_flops(row, training.batch_size, steps),
        parts=(Part(speed="monolith", count=training.batch_size * steps),),
    )


def estimate_expert_samples(stage: Stage, facts: DatasetFacts, earlier: EarlierWork) -> Work:
    """Count the experts' calls, as `ensemble/sampling/expert_samples.py` does."""
    config: ExpertSamplesConfig = stage.config
    calls = config.samples_per_expert * facts.num_experts * (2 * config.steps - 1)
    row = _mean_expert_row(stage.inputs, facts)
    return Work(flops=calls * row, parts=(_expert_calls(calls * row, facts),))


def estimate_distilled_monolith(stage: Stage, facts: DatasetFacts, earlier: EarlierWork) -> Work:
    """Count the training, and one teacher call per row."""
    config: DistilledMonolithStageConfig = stage.config
    training, row = config.expert.training, facts.row_flops["expert"]
    rows = training.batch_size * training.steps
    teacher_flops = rows * _mean_expert_row(stage.inputs, facts)
    parts = (Part(speed="monolith", count=rows), _expert_calls(teacher_flops, facts))
    return Work(flops=training_flops(row, training.batch_size, training.steps) + teacher_flops, parts=parts)


def estimate_score(stage: Stage, facts: DatasetFacts, earlier: EarlierWork) -> Work:
    """Count the sampling and scoring of one selection; for `auto`, of the most expensive one that is allowed."""
    config: ScoreStageConfig = stage.config
    images = min(config.evaluation.num_samples, facts.images or config.evaluation.num_samples)
    again = count_repeats(images)
    if "selection_search" not in stage.inputs:
        return _sampling_work(stage, images, _calls(stage, config.sampling), facts, again)
    search: SelectionSearchConfig = stage.inputs["selection_search"].stage.config.search
    calls = [_calls(stage, replace(config.sampling, selection=selection)) for selection in search.candidates]
    return _sampling_work(stage, images, most_expensive(calls, search.max_calls), facts, again)


def estimate_selection_search(stage: Stage, facts: DatasetFacts, earlier: EarlierWork) -> Work:
    """Count a few images of every candidate."""
    config: SelectionSearchStageConfig = stage.config
    sampling = replace(config.sampling, steps=config.search.steps)
    trials = [
        _sampling_work(stage, config.search.num_samples, _calls(stage, replace(sampling, selection=selection)), facts)
        for selection in config.search.candidates
    ]
    return Work(
        flops=sum(trial.flops or 0.0 for trial in trials),
        parts=tuple(part for trial in trials for part in trial.parts or ()),
        is_upper_bound=any(trial.is_upper_bound for trial in trials),
    )


def estimate_compression(stage: Stage, facts: DatasetFacts, earlier: EarlierWork) -> Work:
    """Count the comparison's images of the ensemble before and after; a method's own training is not counted."""
    config: CompressionConfig = stage.config
    sizes = {min(size, config.num_samples) for size in (*config.batch_sizes, config.num_samples)}
    return _comparison_work(stage, facts, 2 * sum(sizes))


def estimate_distill(stage: Stage, facts: DatasetFacts, earlier: EarlierWork) -> Work:
    """Count the comparison, and the students' training by the method's formula at an expert's training speed."""
    method: AnyDistillConfig = stage.config.method
    num_experts, row = len(assembly_stage(stage).config.expert_ids), _expert_row(stage, facts)
    ensemble_row = num_experts * row + facts.row_flops["router"]
    if method.students == "shared":
        flops = _distillation_flops(method, row, ensemble_row)
    else:
        flops = num_experts * _distillation_flops(method, row, row)
    if isinstance(method, WarmedConfig) and method.shared_warmup_steps:
        warmup = replace(method, training=replace(method.training, steps=method.shared_warmup_steps))
        flops += _distillation_flops(warmup, row, ensemble_row)
    comparison = estimate_compression(stage, facts, earlier)
    images = round(flops / training_flops(facts.row_flops["expert"], 1, 1))
    return replace(
        comparison,
        flops=flops + (comparison.flops or 0.0),
        parts=(Part(speed="expert", count=images), *(comparison.parts or ())),
    )


def _mmd_flops(student_row: float, _teacher_row: float, method: MMDConfig) -> float:
    feature_calls = 3 if method.features == "expert" else 0
    return method.training.steps * method.training.batch_size * (4 * method.steps + feature_calls) * student_row


DISTILLATION_FLOPS: Mapping[str, Callable[[float, float, Any], float]] = {
    "sid": sid_flops,
    "consistency": consistency_flops,
    "mmd": _mmd_flops,
    "mean_flow": mean_flow_flops,
    "scm": scm_flops,
    "sign": sign_flops,
    "speedup": speedup_flops,
}
"""Maps (FLOPs of the student on a row, of the teacher on a row, settings) to those of a training, by method."""


def _distillation_flops(method: AnyDistillConfig, student_row: float, teacher_row: float) -> float:
    return DISTILLATION_FLOPS[method.method](student_row, teacher_row, method)


def estimate_timing(stage: Stage, facts: DatasetFacts, earlier: EarlierWork) -> Work:
    """Count the timed rounds of both ensembles, and one round of warm-up."""
    return _comparison_work(stage, facts, 2 * (stage.config.turns + 1) * sum(stage.config.batch_sizes))


def assembly_stage(stage: Stage) -> Stage:
    """Return the stage that assembled the ensemble which `stage` reads, directly or after compressions."""
    source = stage.inputs["ensemble"].stage
    return source if source.kind == "ensemble" else assembly_stage(source)


def _comparison_work(stage: Stage, facts: DatasetFacts, images: int) -> Work:
    """Return the work of sampling `images`, as if both ensembles were the original."""
    ensemble = assembly_stage(stage)
    calls = calls_per_image(
        stage.config.sampling,
        len(ensemble.config.expert_ids),
        has_router="router" in ensemble.inputs,
        is_conditional=stage.config.labelled,
    )
    flops, parts = _image_calls(stage, images, calls, facts)
    return Work(flops=flops, parts=parts, is_upper_bound=calls.is_upper_bound)


def _sampling_work(stage: Stage, images: int, calls: CallsPerImage, facts: DatasetFacts, again: int = 0) -> Work:
    """Return the work of sampling `images`, `again` of them twice, and of extracting features for the score."""
    flops, parts = _image_calls(stage, images + again, calls, facts)
    feature_flops = images * sum(extractor.flops for _, extractor in _score_extractors(facts))
    if stage.config.evaluation.conditional:
        feature_flops += images * facts.row_flops.get("text", 0.0)
    return Work(
        flops=flops + feature_flops,
        parts=(*parts, Part(speed="score", count=images)),
        is_upper_bound=calls.is_upper_bound,
    )


def _image_calls(
    stage: Stage, images: int, calls: CallsPerImage, facts: DatasetFacts
) -> tuple[float, tuple[Part, ...]]:
    expert_flops = images * calls.expert * _expert_row(stage, facts)
    router_calls = images * calls.router
    parts = (_expert_calls(expert_flops, facts), Part(speed="router_row", count=router_calls))
    return expert_flops + router_calls * facts.row_flops["router"], parts


def _calls(stage: Stage, sampling: SamplingConfig) -> CallsPerImage:
    ensemble = assembly_stage(stage)
    return calls_per_image(
        sampling,
        len(ensemble.config.expert_ids),
        has_router="router" in ensemble.inputs,
        is_conditional=stage.config.evaluation.conditional,
    )


def _expert_calls(flops: float, facts: DatasetFacts) -> Part:
    """Return FLOPs of experts as calls of the one whose speed is measured."""
    return Part(speed="expert_row", count=round(flops / facts.row_flops["expert"]))


def _expert_row(stage: Stage, facts: DatasetFacts) -> float:
    return _mean_expert_row(assembly_stage(stage).inputs, facts)


def _mean_expert_row(inputs: Mapping[str, Input], facts: DatasetFacts) -> float:
    """Return the mean FLOPs of a row through the experts among the inputs."""
    default = facts.row_flops["expert"]
    names = [artifact.stage.name for role, artifact in inputs.items() if role.startswith("expert")]
    rows = [facts.row_flops.get(name, default) for name in names]
    return sum(rows) / len(rows) if rows else default


def _score_extractors(facts: DatasetFacts) -> list[tuple[str, ExtractorCost]]:
    return [
        (name.removeprefix("score/"), extractor)
        for name, extractor in facts.extractors.items()
        if name.startswith("score/")
    ]
