"""Find the models of a service: finished runs, and folders of ensembles."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ensemble.config import SamplingConfig
from orchestrator.config.stage_kinds import COMPRESSION_KINDS
from orchestrator.errors import ConfigError, RunFolderError
from orchestrator.reporting.results import current_graph, find_pipeline, resolve_selection, verify_pipeline
from orchestrator.run.run_folder import RunFolder
from orchestrator.serving.request import compressed_name


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where a model is, and how it is sampled."""

    name: str
    folder: Path
    sampling: SamplingConfig
    compressions: tuple[str, ...] = ()
    """Stages that made smaller or faster models of it, which are models of their own."""


def find_sources(names: Sequence[str]) -> list[ModelSource]:
    """Return the model of each `RUN`, `FOLDER` or `NAME=FOLDER`, after its checksums are verified.

    A run's model has its sampling settings, a folder's the defaults. Raises `ConfigError` for two of one name, and
    `RunFolderError` or an `ArtifactError` for folders that are neither, unfinished or damaged.
    """
    sources: dict[str, ModelSource] = {}
    for text in names:
        name, _, folder = text.rpartition("=")
        path = Path(folder).expanduser().resolve()
        for source in _find(name or path.name, path):
            if source.name in sources:
                raise ConfigError(f"two models are named {source.name}; name one of them: OTHER_NAME={folder}")
            sources[source.name] = source
    return list(sources.values())


def _find(name: str, path: Path) -> list[ModelSource]:
    """Return a model, and after it those that the run's compression stages made of it."""
    if not any((path / file).is_file() for file in ("config.yaml", "model_index.json")):
        raise RunFolderError(
            f"{path} is neither a run nor the folder of an ensemble: it has no config.yaml and no model_index.json; "
            "name another one"
        )
    if not (path / "config.yaml").is_file():
        return [ModelSource(name=name, folder=verify_pipeline(path), sampling=SamplingConfig())]
    run = RunFolder(path)
    config = run.load_config()
    sampling = config.ensemble
    sampling = replace(sampling, selection=resolve_selection(run, sampling.selection), reflection=None)
    stages = [stage for stage in current_graph(run, config) if stage.kind in COMPRESSION_KINDS]
    folders = {stage.name: run.artifact(stage) for stage in stages if run.is_finished(stage)}
    original = ModelSource(
        name=name, folder=find_pipeline(run, monolith=False), sampling=sampling, compressions=tuple(folders)
    )
    compressed = [
        ModelSource(name=compressed_name(name, stage), folder=verify_pipeline(folder), sampling=sampling)
        for stage, folder in folders.items()
    ]
    return [original, *compressed]
