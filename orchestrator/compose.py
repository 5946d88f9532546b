"""From YAML files and overrides to nested dictionaries; the one file that imports Hydra."""

import difflib
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from artifacts import plain
from orchestrator.config import RunConfig, known_keys
from orchestrator.errors import ConfigError


def config_folder() -> str:
    """The folder `cluster_configs`, in a checkout or installed from the wheel."""
    found = importlib.util.find_spec("cluster_configs")
    if found is None or not found.submodule_search_locations:
        raise ConfigError("the folder cluster_configs is not installed; install decentralized-diffusion again")
    return str(Path(next(iter(found.submodule_search_locations))).resolve())


def compose(overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration as nested dictionaries; raises `ConfigError` for what Hydra does not accept."""
    _register_defaults()
    try:
        with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
            return to_dictionary(hydra.compose("config", overrides=[quoted(text) for text in overrides]))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(str(error), overrides)) from None


def to_dictionary(composed: DictConfig) -> dict[str, Any]:
    """Resolve interpolations and leave Hydra's types behind."""
    values = OmegaConf.to_container(composed, resolve=True)
    if not isinstance(values, dict):
        raise ConfigError(f"a configuration is a mapping, not a {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def quoted(override: str) -> str:
    """An override whose value Hydra's grammar would refuse, such as a path with braces or a tilde, as a string."""
    key, assigned, value = override.partition("=")
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'{key}{assigned}"{escaped}"'
    return override


def sweep(overrides: Sequence[str], job: Callable[[dict[str, Any], str], None]) -> None:
    """Call `job(configuration, label)` for every combination, through Hydra's launcher and sweeper.

    The label names the swept values, such as `partition.num_experts=2`.
    """
    _register_defaults()
    arguments = [quoted(text) for text in overrides]
    parsed = OverridesParser.create().parse_overrides(arguments)
    swept = {override.key_or_group for override in parsed if override.is_sweep_override()}

    def one(composed: DictConfig) -> None:
        task = HydraConfig.get().overrides.task
        label = ",".join(sorted(text for text in task if text.partition("=")[0].lstrip("+") in swept))
        job(to_dictionary(composed), re.sub(r"[^\w.=,+-]", "_", label) or "only")

    sys.argv = ["ddm", "--multirun", *arguments]
    hydra.main(version_base="1.3", config_path=config_folder(), config_name="config")(one)()


def _register_defaults() -> None:
    """Let Hydra know every key of the dataclasses with its default, so that YAML names only what differs.

    The network is left out: its keys depend on its kind, and so each file of the group `expert` names them all.
    """
    defaults = plain(RunConfig())
    del defaults["expert"]["network"]
    ConfigStore.instance().store("dataclass_defaults", defaults)


def _explain(message: str, overrides: Sequence[str]) -> str:
    """Hydra's message, with the known keys for an override that names an unknown one."""
    first = message.splitlines()[0]
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        *parents, leaf = key.split(".")
        known = known_keys(tuple(parents))
        if f"'{key}'" in message and leaf not in known:
            close = difflib.get_close_matches(leaf, known, n=1)
            hint = f"; did you mean {'.'.join([*parents, close[0]])}?" if close else ""
            return f"{key}: unknown key{hint}\n  known here: {', '.join(known) or 'nothing'}"
    return f"{first}\n  given: {' '.join(overrides)}\n  the groups and their files are in {config_folder()}"
