"""The registry of stage kinds: each kind's configuration, run function, cost estimate and role.

To add a kind: write its work in the package that it belongs to, a function in a `run_…` file of `pipeline/`, an
`estimate_…` function in `planning/cost_model.py`, a row here, a field in `StagesConfig`, and a node in
`pipeline/graph.py`.

The configuration, the planner and the controller read this table, so it must not import what a stage needs. It
therefore names classes and functions as strings and imports them on first use.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

ESTIMATE_MODULE = "orchestrator.planning.cost_model"


@dataclass(frozen=True, slots=True)
class StageKind:
    """A kind of stage; `config`, `run` and `estimate` import their module when they are read."""

    config_import: str
    """Class of the stage's configuration, as `module:name`."""
    run_import: str
    """Function `(config, inputs, out, workspace) -> FLOPs`, as `module:name` in `orchestrator/pipeline`."""
    estimate_name: str
    """Function of `ESTIMATE_MODULE`: `(stage, facts, earlier work) -> Work`."""
    is_training: bool = False
    """Whether it trains a network: it writes checkpoints, runs on islands by default, and may have several workers."""
    is_compression: bool = False
    """Whether it turns an ensemble into a smaller or faster one; such a stage is also a section of `RunConfig`."""
    is_ours: bool = False
    """Whether its FLOPs count as training of the ensemble when it is compared with the monolith."""
    trained_as: str = ""
    """The kind whose measured training speed applies; empty means its own."""

    @property
    def config(self) -> type[Any]:
        """Return the class of the stage's configuration."""
        config: type[Any] = _import_name(self.config_import)
        return config

    @property
    def run(self) -> Callable[..., float]:
        """Return the function that runs the stage; imports what stages of this kind need."""
        run: Callable[..., float] = _import_name(f"orchestrator.pipeline.{self.run_import}")
        return run

    @property
    def estimate(self) -> Callable[..., Any]:
        """Return the function that estimates the stage's work; imports torch."""
        estimate: Callable[..., Any] = _import_name(f"{ESTIMATE_MODULE}:{self.estimate_name}")
        return estimate


@cache
def _import_name(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


_CONFIGS = "orchestrator.pipeline.stage_configs"
_COMPRESSION = "ensemble.compression.config:CompressionConfig"

STAGE_KINDS: dict[str, StageKind] = {
    "dataset": StageKind("data_partition.config:DataConfig", "run_data:run_dataset", "estimate_dataset"),
    "codec": StageKind("experts.config:CodecConfig", "run_training:run_codec", "estimate_codec"),
    "decoder": StageKind("experts.config:CodecConfig", "run_training:run_decoder", "estimate_decoder"),
    "latents": StageKind(f"{_CONFIGS}:LatentsStageConfig", "run_training:run_latents", "estimate_latents"),
    "features": StageKind(
        "data_partition.config:PartitionConfig", "run_data:run_features", "estimate_features", is_ours=True
    ),
    "partition": StageKind(
        "data_partition.config:PartitionConfig", "run_data:run_partition", "estimate_partition", is_ours=True
    ),
    "reference": StageKind("ensemble.config:EvaluationConfig", "run_sampling:run_reference", "estimate_reference"),
    "init": StageKind(f"{_CONFIGS}:InitStageConfig", "run_training:run_init", "estimate_nothing"),
    "expert": StageKind(
        f"{_CONFIGS}:ExpertStageConfig", "run_training:run_expert", "estimate_expert", is_training=True, is_ours=True
    ),
    "expert_samples": StageKind(
        "ensemble.config:ExpertSamplesConfig",
        "run_sampling:run_expert_samples",
        "estimate_expert_samples",
        is_ours=True,
    ),
    "router": StageKind(
        "router.config:RouterConfig", "run_training:run_router", "estimate_router", is_training=True, is_ours=True
    ),
    "monolith": StageKind(
        f"{_CONFIGS}:MonolithStageConfig", "run_training:run_monolith", "estimate_monolith", is_training=True
    ),
    "cluster_conditioned": StageKind(
        f"{_CONFIGS}:MonolithStageConfig",
        "run_training:run_cluster_conditioned",
        "estimate_monolith",
        is_training=True,
        trained_as="monolith",
    ),
    "distilled_monolith": StageKind(
        f"{_CONFIGS}:DistilledMonolithStageConfig",
        "run_training:run_distilled_monolith",
        "estimate_distilled_monolith",
        is_training=True,
        trained_as="monolith",
    ),
    "ensemble": StageKind(f"{_CONFIGS}:EnsembleStageConfig", "run_sampling:run_ensemble", "estimate_nothing"),
    "selection_search": StageKind(
        f"{_CONFIGS}:SelectionSearchStageConfig",
        "run_sampling:run_selection_search",
        "estimate_selection_search",
        is_ours=True,
    ),
    "distill": StageKind(_COMPRESSION, "run_compression:run_compression", "estimate_distill", is_compression=True),
    "accelerate": StageKind(
        _COMPRESSION, "run_compression:run_compression", "estimate_compression", is_compression=True
    ),
    "prune": StageKind(_COMPRESSION, "run_compression:run_compression", "estimate_compression", is_compression=True),
    "quantize": StageKind(_COMPRESSION, "run_compression:run_compression", "estimate_compression", is_compression=True),
    "stitch": StageKind(_COMPRESSION, "run_compression:run_compression", "estimate_compression", is_compression=True),
    "adapter_images": StageKind(
        "orchestrator.config.finetune:AdapterImagesStageConfig", "run_finetune:run_adapter_images", "estimate_nothing"
    ),
    "adapter": StageKind(
        "orchestrator.config.finetune:AdapterStageConfig",
        "run_finetune:run_adapter",
        "estimate_adapter",
        is_training=True,
        trained_as="expert",
    ),
    "timing": StageKind("ensemble.compression.config:TimingConfig", "run_compression:run_timing", "estimate_timing"),
    "score": StageKind(f"{_CONFIGS}:ScoreStageConfig", "run_sampling:run_score", "estimate_score"),
    "nothing": StageKind(f"{_CONFIGS}:NothingConfig", "run_data:run_nothing", "estimate_nothing"),
}

ENGINE_KINDS = ("dataset", "features", "latents", "partition")
"""Kinds that compute where `data.engine` says."""

PARALLEL_KINDS = ("latents", *(name for name, kind in STAGE_KINDS.items() if kind.is_training))
"""Kinds that may have several workers."""

TRAINING_KINDS = tuple(name for name, kind in STAGE_KINDS.items() if kind.is_training)

COMPRESSION_KINDS = tuple(name for name, kind in STAGE_KINDS.items() if kind.is_compression)
"""In the order in which they are applied. A cache needs many steps to save some, so distillation precedes it. Pruning
is measured on the remaining steps. Rounded weights cannot be trained further, so quantization is late."""

OUR_KINDS = tuple(name for name, kind in STAGE_KINDS.items() if kind.is_ours)
