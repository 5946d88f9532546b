"""Protection of a finished run: another configuration in its folder is refused, or moves the old one aside."""

from collections.abc import Iterator, Mapping
from typing import Any

from ddm_core.artifacts import to_jsonable
from orchestrator.config.schema import RunConfig
from orchestrator.errors import ConfigError, RunFolderError
from orchestrator.reporting.results import current_graph, has_ensemble
from orchestrator.run.run_folder import RunFolder

MAX_SHOWN = 10
"""Differences that a message lists."""


def check_replacement(run: RunFolder, config: RunConfig, *, replace: bool) -> None:
    """Raise `ConfigError` if the folder holds a finished run of another configuration; with `replace`, archive that.

    A configuration with the same ensemble, such as one with more scores, replaces nothing. Nor does one in the folder
    of a run that has not finished.
    """
    if not run.config_file.is_file():
        return
    try:
        previous = run.load_config()
    except (ConfigError, RunFolderError):
        return  # damaged or of another version: whoever reads it gets the reason, and a new one is the remedy
    if previous == config or not has_ensemble(run, current_graph(run, previous)):
        return
    if has_ensemble(run, current_graph(run, config)):
        return
    if replace:
        run.archive_config()
        return
    differences = list(list_differences(to_jsonable(previous), to_jsonable(config)))
    rest = f"\n  and {len(differences) - MAX_SHOWN} more" if len(differences) > MAX_SHOWN else ""
    raise ConfigError(
        f"{run.root} holds a finished run with other settings:\n"
        + "\n".join(f"  {line}" for line in differences[:MAX_SHOWN])
        + f"{rest}\nUse another folder (folder=…), or add --replace, which archives the old settings"
    )


def list_differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield every key whose value differs, with both values."""
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from list_differences(before, after, f"{prefix}{key}.")
        elif before != after and f"{prefix}{key}" != "folder":
            yield f"{prefix}{key}: {before} -> {after}"
