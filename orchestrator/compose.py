"""From YAML files and overrides to nested dictionaries: by Hydra, which calls us back for a sweep."""

import contextlib
import difflib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
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
from orchestrator.foreign import check_composed, check_overrides
from orchestrator.sweeps.trial import swept_parameters

FULL_ERROR = "HYDRA_FULL_ERROR"
"""Environment variable that makes Hydra raise its errors; it is set while a sweep is on, for this process alone."""

OPTIONAL = ("experiment", "distill", "accelerate", "prune", "quantize", "switch")
"""Groups of which a run need not have a file."""

OUR_LAUNCHER, OUR_SWEEPER = "hydra/launcher=ddm_ray", "hydra/sweeper=ddm_optuna"


def config_folder() -> str:
    """The folder `cluster_configs`, in a checkout or installed from the wheel."""
    found = importlib.util.find_spec("cluster_configs")
    if found is None or not found.submodule_search_locations:
        raise ConfigError("the folder cluster_configs is not installed; install decentralized-diffusion again")
    return str(Path(next(iter(found.submodule_search_locations))).resolve())


def compose(overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration as nested dictionaries; raises `ConfigError` for what Hydra does not accept, or must not."""
    check_overrides(overrides)
    _register_defaults()
    arguments = [quoted(text) for text in overrides]
    _refuse_unknown_files(arguments)
    try:
        with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
            return to_dictionary(hydra.compose("config", overrides=arguments))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(str(error), overrides)) from None


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


def sweep(overrides: Sequence[str], job: Callable[[dict[str, Any], dict[str, str]], None]) -> None:
    """Walk all combinations through Hydra's sweeper and launcher.

    Hydra's own launcher calls `job(configuration, swept values)` for one after the other; ours run them at once.
    """
    check_overrides(overrides)
    _register_defaults()
    _register_plugins()
    arguments = _with_our_launcher([quoted(text) for text in overrides])
    _refuse_unknown_files(arguments)

    def one(composed: DictConfig) -> None:
        settings = HydraConfig.get()
        swept = swept_keys(arguments) | set(settings.sweeper.get("params") or ())
        job(to_dictionary(composed), swept_parameters(settings.overrides.task, swept))

    sys.argv = ["ddm", "--multirun", *arguments]
    try:
        with _plain_errors():
            hydra.main(version_base="1.3", config_path=config_folder(), config_name="config")(one)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(str(error), overrides)) from None


def swept_keys(overrides: Sequence[str]) -> set[str]:
    """The keys of the overrides that have more than one value."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return {override.get_key_element().lstrip("+") for override in parsed if override.is_sweep_override()}


def _with_our_launcher(arguments: list[str]) -> list[str]:
    """Our sweeper needs our launcher, so choosing the one chooses the other."""
    has_launcher = any(text.startswith("hydra/launcher=") for text in arguments)
    return arguments if has_launcher or OUR_SWEEPER not in arguments else [*arguments, OUR_LAUNCHER]


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Let errors through to us; by itself Hydra prints them, traceback included, and exits."""
    before = os.environ.get(FULL_ERROR)
    os.environ[FULL_ERROR] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[FULL_ERROR]
        else:
            os.environ[FULL_ERROR] = before


def _register_plugins() -> None:
    from orchestrator.sweeps.config import LauncherConfig, OptunaConfig
    from orchestrator.sweeps.launcher import TrialLauncher
    from orchestrator.sweeps.plugins import register
    from orchestrator.sweeps.sweeper import OptunaSweeper

    register(TrialLauncher, OUR_LAUNCHER, LauncherConfig())
    register(OptunaSweeper, OUR_SWEEPER, OptunaConfig())


def _register_defaults() -> None:
    """Let Hydra know every key of the dataclasses with its default, so that YAML names only what differs.

    The network is left out: its keys depend on its kind, and so each file of the group `expert` names them all.
    """
    defaults = plain(RunConfig())
    del defaults["expert"]["network"]
    ConfigStore.instance().store("dataclass_defaults", defaults)


def _refuse_unknown_files(overrides: Sequence[str]) -> None:
    """Raise `ConfigError` for an optional group's file that is not there: Hydra would leave it out without a word."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        group = override.key_or_group
        if group in OPTIONAL:
            known = sorted(path.stem for path in Path(config_folder(), group).glob("*.yaml"))
            chosen = override.sweep_string_iterator() if override.is_sweep_override() else [override.value()]
            for name in chosen:
                if name not in known:
                    raise ConfigError(f"{group}={name}: there is no such {group}; known: {', '.join(known)}")


def _explain(message: str, overrides: Sequence[str]) -> str:
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
