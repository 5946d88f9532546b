"""Results of a run so far, read from its artifacts: its pipelines, and the rows of the tables that people see."""

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any, get_args

from ddm_core.artifacts import is_finished, read_json, read_manifest, verify
from ensemble.config import SamplingConfig
from orchestrator.config.schema import RunConfig
from orchestrator.config.stage_kinds import OUR_KINDS
from orchestrator.errors import ConfigError, RunFolderError
from orchestrator.pipeline.graph import build_graph
from orchestrator.pipeline.stage import Stage, remove_stage
from orchestrator.reporting.tables.ranking import ScoreRow
from orchestrator.run.run_folder import RunFolder
from router.config import AUTO, SelectionConfig, SelectionName, selection_label


def current_graph(run: RunFolder, config: RunConfig) -> list[Stage]:
    """Return the graph, without the experts that a finished ensemble lacks."""
    graph = build_graph(config)
    missing = [stage.name for stage in graph if stage.optional and not run.is_finished(stage)]
    reduced = reduce(remove_stage, missing, graph) if len(missing) < config.partition.num_experts else graph
    return reduced if has_ensemble(run, reduced) else graph


def has_ensemble(run: RunFolder, graph: Sequence[Stage]) -> bool:
    """Return whether the ensemble of this graph is finished."""
    return any(stage.name == "ensemble" and run.is_finished(stage) for stage in graph)


def load_score_rows(run: RunFolder, graph: Sequence[Stage]) -> list[ScoreRow]:
    """Return every finished score, the monolith first, then the default selection."""
    stages = [stage for stage in graph if stage.kind == "score" and run.is_finished(stage)]
    default = next((stage.name for stage in graph if stage.kind == "score"), "")
    rows = [
        ScoreRow(
            name=stage.name.removeprefix("score_"),
            scores=read_json(run.verify_file(stage, "scores.json")),
            is_default=stage.name == default,
        )
        for stage in stages
    ]
    return sorted(rows, key=lambda row: (row.name != "monolith", not row.is_default))


def selection_choice(run: RunFolder, graph: Sequence[Stage]) -> dict[str, Any] | None:
    """Return `selection_choice.json`: selection of `auto`, reason, candidates; None without a finished search."""
    stage = next((stage for stage in graph if stage.kind == "selection_search" and run.is_finished(stage)), None)
    return None if stage is None else dict(read_json(run.verify_file(stage, "selection_choice.json")))


def load_training_flops(run: RunFolder, graph: Sequence[Stage]) -> dict[str, float]:
    """Return FLOPs of every finished stage of either side's training; a selection search belongs to the ensemble's."""
    return {
        stage.name: read_manifest(run.artifact(stage)).flops
        for stage in graph
        if stage.kind in (*OUR_KINDS, "monolith") and run.is_finished(stage)
    }


def find_selection(name: str, config: RunConfig) -> SelectionConfig:
    """Return the run's settings of a selection, or its defaults if the run has none; empty is the run's default.

    Raises `ConfigError` with the known names.
    """
    if not name:
        return config.ensemble.selection
    names = (*get_args(SelectionName), AUTO)
    defaults = [SelectionConfig(name=known_name) for known_name in names]
    for selection in (
        config.ensemble.selection,
        *config.scores.selections,
        *config.selection_search.candidates,
        *defaults,
    ):
        if name in (selection.name, selection_label(selection)):
            return selection
    raise ConfigError(f"a selection must be one of {', '.join(names)}; got {name!r}")


def resolve_selection(run: RunFolder, selection: SelectionConfig) -> SelectionConfig:
    """Return the selection, with `auto` replaced by the result of the run's selection search."""
    if selection.name != AUTO:
        return selection
    choice = selection_choice(run, current_graph(run, run.load_config()))
    if choice is None:
        raise RunFolderError(
            f"{run.root} has no result of a selection search; start one with "
            f"`ddm evaluate {run.root} --selection auto`, or name a selection, such as --selection sticky"
        )
    return SelectionConfig(**choice["selection"])


def resolve_sampling(run: RunFolder, selection: str = "") -> SamplingConfig:
    """Return how the ensemble of a run is sampled with a selection; empty is the run's default.

    `auto` is replaced by the result of the search, which may drop the reflection, and the monolith of a reflection
    by its folder. Raises like `find_selection`, `resolve_selection` and `find_pipeline`.
    """
    config = run.load_config()
    chosen, reflection = find_selection(selection, config), config.ensemble.reflection
    resolved = resolve_selection(run, chosen)
    choice = selection_choice(run, current_graph(run, config)) if chosen.name == AUTO else None
    if reflection is not None and choice is not None and not choice["reflects"]:
        reflection = None
    if reflection is not None and reflection.weak == "monolith":
        reflection = replace(reflection, weak="folder", path=str(find_pipeline(run, monolith=True)))
    return replace(config.ensemble, selection=resolved, reflection=reflection)


def find_pipeline(run: RunFolder, *, monolith: bool) -> Path:
    """Return the last finished pipeline folder of the ensemble or the monolith, after its checksums are verified.

    Until a new configuration has one, that is the one of the configuration that it replaced.
    """
    name = "monolith_ensemble" if monolith else "ensemble"
    for archived in (None, *run.archived_configs()):
        graph = current_graph(run, run.load_config(archived))
        stage = next((stage for stage in graph if stage.name == name), None)
        if stage is not None and run.is_finished(stage):
            verify(run.artifact(stage))
            return run.artifact(stage)
    if monolith and not any(stage.name == name for stage in current_graph(run, run.load_config())):
        raise RunFolderError(f"{run.root} has no monolith; its settings with baselines=[monolith] would train one")
    raise RunFolderError(f"{run.root} has no finished {name}; finish the run with `ddm resume {run.root}`")


def verify_pipeline(folder: Path) -> Path:
    """Return a pipeline folder after its checksums are verified, if it is an artifact and so has them.

    Raises `RunFolderError` if it is not a pipeline, and `CorruptArtifact` that names the damaged files.
    """
    if not (folder / "model_index.json").is_file():
        raise RunFolderError(f"{folder} is not the folder of an ensemble: it has no model_index.json; name another one")
    if is_finished(folder):
        verify(folder)
    return folder
