"""The configuration of every stage, computed once from a run's configuration.

A stage's configuration holds only what the stage depends on. Everything else is left out or set to its default, so
that a change elsewhere does not change the stage's fingerprint.
"""

from collections.abc import Mapping
from dataclasses import dataclass as plain_dataclass
from dataclasses import field, fields, replace
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from data_partition.config import DataConfig, PartitionConfig
from ddm_core.artifacts import STRICT, UNHASHED, UNHASHED_IF_DEFAULT
from ensemble.compression.config import CompressionConfig, MethodConfig, TimingConfig
from ensemble.config import (
    EvaluationConfig,
    ExpertSamplesConfig,
    ReplicationLimits,
    SamplingConfig,
    SelectionSearchConfig,
    ValidationConfig,
)
from experts.config import ExpertConfig, TextConfig, TrainingConfig
from orchestrator.config.finetune import AdapterImagesStageConfig
from orchestrator.config.schema import RunConfig
from orchestrator.config.stage_kinds import COMPRESSION_KINDS
from router.config import AUTO, RouterConfig, SelectionConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LatentsStageConfig:
    """The encoding of images and captions."""

    text: TextConfig = TextConfig()
    """The encoder of the captions."""
    device: str = "cpu"
    """Torch device of both encoders."""
    flip: bool = field(default=False, metadata=UNHASHED_IF_DEFAULT)
    """Whether the mirrored training images are encoded too."""
    store: bool = field(default=True, metadata=UNHASHED_IF_DEFAULT)
    """Whether images are encoded, and not only captions."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExpertStageConfig:
    """One expert of a run."""

    expert: ExpertConfig
    """The expert's configuration; its batch is the global batch divided by K."""
    cluster_id: Annotated[int, Field(ge=0)]
    """The cluster on which it is trained; equals the expert's id."""
    validation: ValidationConfig = field(default=ValidationConfig(), metadata=UNHASHED)
    """What is drawn from it while it trains."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MonolithStageConfig:
    """The baseline: one expert on all data, with as many FLOPs as all experts, the router and the clustering."""

    expert: ExpertConfig
    """The experts' configuration with the global batch."""
    router: RouterConfig | None
    """The router whose training FLOPs become extra steps; None if the run has no router."""
    num_experts: int
    """K, which determines the router's size."""
    experts: tuple[ExpertConfig, ...] = field(default=(), metadata=UNHASHED_IF_DEFAULT)
    """The part of each expert's configuration that determines its FLOPs; empty if all experts cost the same."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DistilledMonolithStageConfig:
    """One network that is distilled from all experts."""

    expert: ExpertConfig
    """The network's configuration."""
    from_expert: Annotated[int, Field(ge=0)] | None
    """The expert whose weights initialize it."""
    from_mean: bool = field(default=False, metadata=UNHASHED_IF_DEFAULT)
    """Whether the mean of the experts' weights initializes it."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class InitStageConfig:
    """A pretrained checkpoint that is copied into the run."""

    folder: str
    """Path of the checkpoint."""
    checksum: str
    """Checksum of its files when the configuration was composed."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EnsembleStageConfig:
    """An ensemble assembled from trained models."""

    expert_ids: tuple[int, ...]
    """The experts of the complete ensemble; those that are not among the inputs are missing."""
    content: str = field(default="", metadata=UNHASHED_IF_DEFAULT)
    """Fingerprint of an ensemble's folder that a command has copied into the run; empty assembles the inputs."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ScoreStageConfig:
    """One row of the table of scores."""

    evaluation: EvaluationConfig
    """The number of samples, and the feature spaces."""
    sampling: SamplingConfig
    """Settings of the sampling."""
    limits: ReplicationLimits = field(default=ReplicationLimits(), metadata=UNHASHED_IF_DEFAULT)
    """Limits at which the score fails."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SelectionSearchStageConfig:
    """The search for a selection."""

    search: SelectionSearchConfig
    """The candidates, and how they are tried."""
    evaluation: EvaluationConfig
    """The feature spaces in which candidates are compared."""
    sampling: SamplingConfig
    """Settings of the sampling; each candidate replaces the selection."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NothingConfig:
    """A stage without work, for measurements of the orchestrator's own cost."""

    number: int = 0
    """Distinguishes several such stages."""


@plain_dataclass(frozen=True, kw_only=True)
class StageConfigs:
    """The configurations of all stages of one run that differ from the run's own sections."""

    dataset: DataConfig
    """With captions, if the models read text."""
    latents: LatentsStageConfig
    features: PartitionConfig
    evaluation: EvaluationConfig
    """Shared by the reference, the scores and the selection search."""
    experts: tuple[ExpertConfig, ...]
    """By expert id, each with its part of the global batch."""
    monolith: MonolithStageConfig
    distilled_monolith: DistilledMonolithStageConfig
    expert_samples: ExpertSamplesConfig
    selection_search: SelectionSearchStageConfig
    compressions: Mapping[str, CompressionConfig]
    """By kind, in the order in which they are applied; empty if the run has none."""
    timing: TimingConfig
    adapter_images: AdapterImagesStageConfig | None
    """None without `finetune`."""


def build_stage_configs(config: RunConfig) -> StageConfigs:
    """Compute the configuration of every stage of a run."""
    num_experts = config.partition.num_experts
    evaluation = evaluation_config(config)
    experts = tuple(_divide_batch(config.experts.get(k, config.expert), num_experts) for k in range(num_experts))
    sampling = replace(config.ensemble, selection=_sampling_selection(config), reflection=None)
    is_labelled = config.expert.training.condition_dropout < 1
    return StageConfigs(
        dataset=dataset_config(config),
        latents=latents_config(config),
        features=_features_config(config.partition),
        evaluation=evaluation,
        experts=experts,
        monolith=MonolithStageConfig(
            expert=replace(config.expert, time_bounds=()),
            router=_router_cost(config.router) if num_experts > 1 else None,
            num_experts=num_experts,
            experts=_expert_costs(experts, _divide_batch(config.expert, num_experts)),
        ),
        distilled_monolith=_distilled_monolith_config(config),
        expert_samples=_expert_samples_config(config),
        selection_search=_selection_search_config(config, evaluation),
        compressions={
            kind: CompressionConfig(method=method, sampling=sampling, labelled=is_labelled)
            for kind, method in compression_configs(config).items()
        },
        timing=TimingConfig(sampling=sampling, labelled=is_labelled),
        adapter_images=_adapter_images_config(config),
    )


def _adapter_images_config(config: RunConfig) -> AdapterImagesStageConfig | None:
    """Return what is read of a folder of images: cropped to the run's size, without classes, which may be others."""
    finetune = config.finetune
    if finetune is None:
        return None
    data = replace(
        dataset_config(config),
        source="image_folder",
        path=finetune.images,
        fit="crop",
        aspect_buckets=(),
        labels=False,
        held_out_captions=(),
        limit=None,
    )
    return AdapterImagesStageConfig(
        data=data,
        content=finetune.content,
        experts=finetune.experts if finetune.is_routed else (),
        text=config.text,
        device=config.codec.device,
    )


def dataset_config(config: RunConfig) -> DataConfig:
    """Return the configuration of the data set; a text encoder needs its captions.

    Whether latents are mirrored or stored is no part of it.
    """
    captions = config.data.captions or config.text.kind != "none"
    return replace(config.data, captions=captions, flip=False, store_latents=None)


def latents_config(config: RunConfig) -> LatentsStageConfig:
    """Return what is encoded before the trainings; of pixels that are streamed, nothing but captions."""
    data, store = config.data, config.data.store_latents
    if store is None:
        store = data.mode == "copy" or config.codec.kind != "pixels" or bool(data.aspect_buckets)
    return LatentsStageConfig(text=config.text, device=config.codec.device, flip=data.flip, store=store)


def evaluation_config(config: RunConfig) -> EvaluationConfig:
    """Return the evaluation's own fields of `scores`, without the selections."""
    scores = config.scores
    return EvaluationConfig(**{field.name: getattr(scores, field.name) for field in fields(EvaluationConfig)})


def compression_configs(config: RunConfig) -> dict[str, MethodConfig]:
    """Return the compression methods of a run, by kind and in the order in which they are applied."""
    methods = {kind: getattr(config, kind) for kind in COMPRESSION_KINDS}
    return {kind: method for kind, method in methods.items() if method is not None}


def _divide_batch(expert: ExpertConfig, num_experts: int) -> ExpertConfig:
    return replace(expert, training=replace(expert.training, batch_size=expert.training.batch_size // num_experts))


def _expert_costs(experts: tuple[ExpertConfig, ...], default: ExpertConfig) -> tuple[ExpertConfig, ...]:
    """Return what each expert's FLOPs depend on, without its checkpoint; empty if all experts cost the same."""
    costs = tuple(_expert_cost(expert) for expert in experts)
    are_alike = all(cost == _expert_cost(default) for cost in costs) and {expert.init for expert in experts} == {
        default.init
    }
    return () if are_alike else costs


def _expert_cost(expert: ExpertConfig) -> ExpertConfig:
    training = TrainingConfig(steps=expert.training.steps, batch_size=expert.training.batch_size)
    return ExpertConfig(network=expert.network, training=training)


def _router_cost(config: RouterConfig) -> RouterConfig:
    """Return what the router's FLOPs depend on; defaults for the rest keep the monolith's fingerprint stable."""
    training = TrainingConfig(steps=config.training.steps, batch_size=config.training.batch_size)
    return replace(config, noise_schedule="rectified_flow", training=training)


def _distilled_monolith_config(config: RunConfig) -> DistilledMonolithStageConfig:
    """Return the monolith's configuration with the student's own steps and batch size."""
    training, student = config.expert.training, config.distilled_monolith
    steps, batch_size = student.steps or training.steps, student.batch_size or training.batch_size
    expert = replace(config.expert, time_bounds=(), training=replace(training, steps=steps, batch_size=batch_size))
    return DistilledMonolithStageConfig(expert=expert, from_expert=student.from_expert, from_mean=student.from_mean)


def _expert_samples_config(config: RunConfig) -> ExpertSamplesConfig:
    """Return how the router's training samples are generated by the experts."""
    router, sampling = config.router, config.ensemble
    return ExpertSamplesConfig(
        samples_per_expert=router.samples_per_expert,
        steps=router.sample_steps,
        noise_schedule=router.noise_schedule,
        batch_size=sampling.batch_size,
        device=sampling.device,
        seed=router.training.seed,
    )


def _features_config(config: PartitionConfig) -> PartitionConfig:
    """Return what the features depend on; a run with another K then reuses finished features."""
    return PartitionConfig(
        features=config.features,
        features_path=config.features_path,
        components=config.components,
        batch_size=config.batch_size,
        seed=config.seed,
    )


def _selection_search_config(config: RunConfig, evaluation: EvaluationConfig) -> SelectionSearchStageConfig:
    """Return the search with all candidates, or with the first alone if a single expert makes them equal."""
    candidates = config.selection_search.candidates[: 1 if config.partition.num_experts == 1 else None]
    return SelectionSearchStageConfig(
        search=replace(config.selection_search, candidates=candidates),
        evaluation=evaluation,
        sampling=replace(config.ensemble, selection=SelectionConfig()),
    )


def _sampling_selection(config: RunConfig) -> SelectionConfig:
    """Return the selection with which compressions sample: the run's own, or the default in place of `auto`."""
    selection = config.ensemble.selection
    return SelectionConfig() if selection.name == AUTO else selection
