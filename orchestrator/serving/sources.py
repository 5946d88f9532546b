"""Find the models of a service: finished runs, and folders of ensembles."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

from ddm_core.artifacts import read_json, verify
from ensemble.config import SamplingConfig
from orchestrator.config.stage_kinds import COMPRESSION_KINDS
from orchestrator.errors import ConfigError, RunFolderError
from orchestrator.pipeline.stage import Stage
from orchestrator.reporting.results import (
    current_graph,
    find_pipeline,
    find_selection,
    resolve_sampling,
    verify_pipeline,
)
from orchestrator.run.run_folder import RunFolder
from orchestrator.serving.request import variant_name
from router.config import AUTO, SelectionConfig, SelectionName, selection_label

FINETUNE = "finetune"
"""Name of the adapter that `ddm finetune` trained in the run itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where a model is, and how it is sampled."""

    name: str
    folder: Path
    sampling: SamplingConfig
    selections: Mapping[str, SelectionConfig] = field(
        default_factory=lambda: {name: SelectionConfig(name=name) for name in get_args(SelectionName)}
    )
    """By the names that requests may use."""
    compressions: tuple[str, ...] = ()
    """Stages that made smaller or faster models of it, which are models of their own."""
    adapters: Mapping[str, Mapping[int, Path]] = field(default_factory=dict)
    """File or folder of the LoRA of each expert that has one, by the name of the adapter."""


def find_sources(names: Sequence[str], adapters: Sequence[str] = ()) -> list[ModelSource]:
    """Return the model of each `RUN`, `FOLDER` or `NAME=FOLDER`, after its checksums are verified.

    `adapters` are `NAME=FOLDER` for the first model, and `MODEL:NAME=FOLDER`; their files are not read yet.

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
    for text in adapters:
        source = _add_adapter(sources, text)
        sources[source.name] = source
    return list(sources.values())


def _add_adapter(sources: Mapping[str, ModelSource], text: str) -> ModelSource:
    """Return the model that `[MODEL:]NAME=FOLDER` means, with this adapter; raise `ConfigError` for one that it has."""
    label, _, folder = text.rpartition("=")
    model, _, name = label.rpartition(":")
    source = sources.get(model or next(iter(sources)))
    if source is None or not name:
        known = ", ".join(sources)
        raise ConfigError(f"--adapter is NAME=FOLDER or MODEL:NAME=FOLDER, of a model among {known}; got {text!r}")
    if name in (*source.compressions, *source.adapters):
        raise ConfigError(f"{source.name} has {name} already; choose another name: --adapter OTHER_NAME={folder}")
    files = _find_adapter(source.folder, Path(folder).expanduser().resolve())
    return replace(source, adapters={**source.adapters, name: files})


def _find_adapter(ensemble: Path, path: Path) -> dict[int, Path]:
    """Return the experts of an adapter with their files: those with a folder of their own, or all with the same."""
    experts = {int(folder.name.removeprefix("expert_")): path / folder.name for folder in ensemble.glob("expert_*")}
    own = {k: folder for k, folder in experts.items() if folder.is_dir()}
    if not path.exists() or not experts:
        raise ConfigError(
            f"--adapter {path} is not there; name the folder that `ddm finetune` wrote, or a safetensors file"
            if experts
            else f"the experts of {ensemble} are one network, which takes no --adapter; leave it out"
        )
    return own or dict.fromkeys(experts, path)


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
    config, sampling = run.load_config(), resolve_sampling(run)
    known = [find_selection(selection, config) for selection in get_args(SelectionName)]
    known += [*config.scores.selections, *config.selection_search.candidates]
    selections = {selection_label(selection): selection for selection in known if selection.name != AUTO}
    selections |= {selection.name: selection for selection in known[: len(get_args(SelectionName))]}
    finished = [stage for stage in current_graph(run, config) if run.is_finished(stage)]
    folders = {stage.name: run.artifact(stage) for stage in finished if stage.kind in COMPRESSION_KINDS}
    trained = _find_trained_adapter(run, finished)
    original = ModelSource(
        name=name,
        folder=find_pipeline(run, monolith=False),
        sampling=sampling,
        selections=selections,
        compressions=tuple(folders),
        adapters={FINETUNE: trained} if trained else {},
    )
    compressed = [
        ModelSource(
            name=variant_name(name, stage), folder=verify_pipeline(folder), sampling=sampling, selections=selections
        )
        for stage, folder in folders.items()
    ]
    return [original, *compressed]


def _find_trained_adapter(run: RunFolder, finished: Sequence[Stage]) -> dict[int, Path]:
    """Return the folders of the run's own adapters, after their checksums are verified."""
    folders = {int(s.name.removeprefix("adapter_")): run.artifact(s) for s in finished if s.kind == "adapter"}
    for folder in folders.values():
        verify(folder)
    return {k: folder for k, folder in folders.items() if read_json(folder / "training.json")["images"]}
