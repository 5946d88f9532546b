"""From YAML files and overrides to nested dictionaries: by Hydra."""

import difflib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ddm_core.artifacts import to_jsonable
from orchestrator.config.injection_guard import check_composed, check_overrides
from orchestrator.config.schema import RunConfig, known_keys
from orchestrator.errors import ConfigError

OPTIONAL = ("experiment", "distill", "accelerate", "prune", "quantize", "stitch")
"""Groups of which a run need not have a file."""


def config_folder() -> str:
    """The folder `cluster_configs`, in a checkout or installed from the wheel."""
    found = importlib.util.find_spec("cluster_configs")
    if found is None or not found.submodule_search_locations:
        raise ConfigError("the folder cluster_configs is not installed; install decentralized-diffusion again")
    return str(Path(next(iter(found.submodule_search_locations))).resolve())


def compose(overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration as nested dictionaries; raises `ConfigError` for what Hydra does not accept, or must not."""
    check_overrides(overrides)
    register_defaults()
    arguments = [quoted(text) for text in overrides]
    refuse_unknown_files(arguments)
    try:
        with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
            return to_dictionary(hydra.compose("config", overrides=arguments))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain_error(str(error), overrides)) from None


def to_dictionary(composed: DictConfig) -> dict[str, Any]:
    """Resolve interpolations and leave Hydra's types behind."""
    check_composed(OmegaConf.to_container(composed, resolve=False))
    values = OmegaConf.to_container(composed, resolve=True)
    if not isinstance(values, dict):
        raise ConfigError(f"a configuration is a mapping, not a {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def quoted(override: str) -> str:
    """An override whose value Hydra's grammar would refuse, such as a path with braces or a tilde, as a string.

    What is below `experts`, or below a group that has a file only if it is asked for, may be new to Hydra;
    `parse_config` checks it.
    """
    key, assigned, value = override.partition("=")
    if key.split(".")[0] == "experts" or ("." in key and key.split(".")[0] in OPTIONAL):
        return quoted(f"++{override}")
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'{key}{assigned}"{escaped}"'
    return override


def swept_keys(overrides: Sequence[str]) -> set[str]:
    """The keys of the overrides that have more than one value."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return {override.get_key_element().lstrip("+") for override in parsed if override.is_sweep_override()}


def register_defaults() -> None:
    """Let Hydra know every key of the dataclasses with its default, so that YAML names only what differs.

    The network is left out: its keys depend on its kind, and so each file of the group `expert` names them all.
    """
    defaults = to_jsonable(RunConfig())
    del defaults["expert"]["network"]
    ConfigStore.instance().store("dataclass_defaults", defaults)


def refuse_unknown_files(overrides: Sequence[str]) -> None:
    """Raise `ConfigError` for an optional group's file that is not there: Hydra would leave it out without a word."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        group = override.key_or_group
        if group in OPTIONAL:
            known = sorted(path.stem for path in Path(config_folder(), group).glob("*.yaml"))
            chosen = override.sweep_string_iterator() if override.is_sweep_override() else [override.value()]
            for name in chosen:
                if name not in known:
                    raise ConfigError(f"{group}={name}: there is no such {group}; known: {', '.join(known)}")


def explain_error(message: str, overrides: Sequence[str]) -> str:
    """Hydra's message, with the known keys for an override that names an unknown one."""
    first = " ".join(message.partition("Config search path")[0].split())
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        *parents, leaf = key.split(".")
        known = known_keys(tuple(parents))
        if "/" not in key and f"'{key}'" in message and leaf not in known:
            close = difflib.get_close_matches(leaf, known, n=1)
            hint = f"; did you mean {'.'.join([*parents, close[0]])}?" if close else ""
            return f"{key}: unknown key{hint}\n  known here: {', '.join(known) or 'nothing'}"
    return f"{first}\n  given: {' '.join(overrides)}\n  the groups and their files are in {config_folder()}"
