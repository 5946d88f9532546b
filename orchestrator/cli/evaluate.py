"""`ddm evaluate`: the configuration that scores a finished run with one more selection."""

from dataclasses import replace

from orchestrator.cli.sample import find_pipeline, find_selection
from orchestrator.config.compute import ComputeConfig
from orchestrator.config.schema import RunConfig
from orchestrator.run.run_folder import RunFolder
from orchestrator.run.trust import is_trusted


def with_selection(run: RunFolder, selection: str) -> RunConfig:
    """Return a finished run's configuration with one more selection to score.

    Nothing of `compute` is used if another user wrote it. Raises `RunFolderError` if the ensemble is not finished, and
    `ConfigError` for an unknown selection.
    """
    config = run.load_config()
    find_pipeline(run, monolith=False)
    selections = tuple(dict.fromkeys((*config.scores.selections, find_selection(selection, config))))
    compute = config.compute if is_trusted(run) else ComputeConfig()
    return replace(config, folder=str(run.root), compute=compute, scores=replace(config.scores, selections=selections))
