"""Decentralized diffusion models: partition a data set, train isolated experts, sample them as one model.

    run = ddm.run("experiment=digits")              # or ddm.Run("runs/demo") for a run that exists
    pipe = run.pipeline()                           # or ddm.DDMPipeline.from_pretrained("runs/digits")
    pipe(seeds=range(4), class_labels="3").images   # PIL images

Names are imported when they are first used (PEP 562): `import ddm` loads neither torch nor Ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_partition.errors import DataError
    from data_partition.partition import Partition
    from ddm.commands import compress, evaluate, load_config, plan, run, submit
    from ddm.pipeline import DDMModularPipeline, DDMPipeline
    from ddm.runs import Run, StageStatus
    from ddm.training import train_expert, train_router
    from ddm_core.artifacts import ArtifactError
    from ddm_core.errors import DDMError
    from ensemble.config import SamplingConfig
    from ensemble.ensemble import Ensemble, EnsembleError
    from ensemble.pipelines.call import PipelineOutput
    from ensemble.pipelines.paris import import_paris
    from experts.conditions.condition import Condition
    from experts.config import CodecConfig, ExpertConfig, TrainingConfig
    from experts.diffusion.noise_schedule import NoiseSchedule
    from experts.expert import Expert
    from orchestrator.config.schema import RunConfig
    from orchestrator.errors import ConfigError, OrchestratorError
    from router.config import RouterConfig, SelectionConfig
    from router.router import Router

_MODULES = {
    "ArtifactError": "ddm_core.artifacts",
    "CodecConfig": "experts.config",
    "Condition": "experts.conditions.condition",
    "ConfigError": "orchestrator.errors",
    "DDMError": "ddm_core.errors",
    "DDMModularPipeline": "ddm.pipeline",
    "DDMPipeline": "ddm.pipeline",
    "DataError": "data_partition.errors",
    "Ensemble": "ensemble.ensemble",
    "EnsembleError": "ensemble.ensemble",
    "Expert": "experts.expert",
    "ExpertConfig": "experts.config",
    "NoiseSchedule": "experts.diffusion.noise_schedule",
    "OrchestratorError": "orchestrator.errors",
    "Partition": "data_partition.partition",
    "PipelineOutput": "ensemble.pipelines.call",
    "Router": "router.router",
    "RouterConfig": "router.config",
    "Run": "ddm.runs",
    "RunConfig": "orchestrator.config.schema",
    "SamplingConfig": "ensemble.config",
    "SelectionConfig": "router.config",
    "StageStatus": "ddm.runs",
    "TrainingConfig": "experts.config",
    "compress": "ddm.commands",
    "evaluate": "ddm.commands",
    "import_paris": "ensemble.pipelines.paris",
    "load_config": "ddm.commands",
    "plan": "ddm.commands",
    "run": "ddm.commands",
    "submit": "ddm.commands",
    "train_expert": "ddm.training",
    "train_router": "ddm.training",
}
"""Where each public name is defined."""

__all__ = [
    "ArtifactError",
    "CodecConfig",
    "Condition",
    "ConfigError",
    "DDMError",
    "DDMModularPipeline",
    "DDMPipeline",
    "DataError",
    "Ensemble",
    "EnsembleError",
    "Expert",
    "ExpertConfig",
    "NoiseSchedule",
    "OrchestratorError",
    "Partition",
    "PipelineOutput",
    "Router",
    "RouterConfig",
    "Run",
    "RunConfig",
    "SamplingConfig",
    "SelectionConfig",
    "StageStatus",
    "TrainingConfig",
    "compress",
    "evaluate",
    "import_paris",
    "load_config",
    "plan",
    "run",
    "submit",
    "train_expert",
    "train_router",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module 'ddm' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
