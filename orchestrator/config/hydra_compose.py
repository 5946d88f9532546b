"""Compose nested dictionaries from YAML files and overrides, with Hydra."""

import difflib
import importlib.util
import re
from collections.abc import Sequence
from functools import cache
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
from orchestrator.config.schema import RunConfig, is_text, known_keys
from orchestrator.config.stage_kinds import COMPRESSION_KINDS
from orchestrator.errors import ConfigError

SWEEP_FUNCTION = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\(")
"""Hydra's functions for several values, which commas do not divide."""

QUOTED = re.compile(r"'.*'|\".*\"", re.DOTALL)

OPTIONAL = ("experiment", *COMPRESSION_KINDS)
"""Groups without a default file."""


def check_words(overrides: Sequence[str]) -> None:
    """Raise `ConfigError` for a word that is no override, with what it may mean."""
    for word in overrides:
        key, assigned, _ = word.partition("=")
        if (assigned and key.strip()) or word.startswith("~"):
            continue
        raise ConfigError(f"{word!r} is not an override: write key=value or group=file; {_suggest(word)}")


def _suggest(word: str) -> str:
    """Return what a word may mean, as a question."""
    path, experiments = Path(word).expanduser(), _group_files("experiment")
    if path.joinpath("config.yaml").is_file():
        return f"to continue this run, did you mean `ddm resume {word}`?"
    if path.suffix in (".yaml", ".yml"):
        return f"did you mean `--config {word}`?"
    if path.is_dir():
        return f"did you mean data=image_folder data.path={word}?"
    close = difflib.get_close_matches(path.name, experiments, n=1)
    if close and path.parent != Path():
        return f"did you mean experiment={close[0]} folder={word}?"
    return f"did you mean experiment={close[0]}?" if close else f"the experiments are {', '.join(experiments)}"


def _group_files(group: str) -> list[str]:
    return sorted(path.stem for path in Path(config_folder(), group).glob("*.yaml"))


def config_folder() -> str:
    """Return the folder `cluster_configs` of the checkout or the installed wheel."""
    spec = importlib.util.find_spec("cluster_configs")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("the folder cluster_configs is not installed; install decentralized-diffusion again")
    return str(Path(next(iter(spec.submodule_search_locations))).resolve())


def compose(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the configuration as nested dictionaries; raises `ConfigError` for invalid or unsafe overrides."""
    check_words(overrides)
    check_overrides(overrides)
    register_defaults()
    try:
        arguments = [quote_override(text) for text in overrides]
        check_group_files(arguments)
        with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
            return to_dictionary(hydra.compose("config", overrides=arguments))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain_error(str(error), overrides)) from None


def to_dictionary(composed: DictConfig) -> dict[str, Any]:
    """Resolve interpolations and convert Hydra's types to plain ones."""
    check_composed(OmegaConf.to_container(composed, resolve=False))
    values = OmegaConf.to_container(composed, resolve=True)
    if not isinstance(values, dict):
        raise ConfigError(f"a configuration is a mapping, not a {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def quote_override(override: str, *, is_sweep: bool = False) -> str:
    """Return the override with its value quoted where Hydra's grammar would reject or change it.

    A path may have braces, a comma or a tilde, and the value of a text may look like a number. In a sweep, commas
    separate several values. Keys below `experts`, `ensemble.reflection`, the settings of a network's class and optional
    groups get the prefix `++`, since Hydra may not know them; the checks of the configuration do.
    """
    key, assigned, value = override.partition("=")
    if (
        key.split(".")[0] == "experts"
        or key.startswith(("ensemble.reflection.", "expert.network.settings"))
        or ("." in key and key.split(".")[0] in OPTIONAL)
    ):
        return quote_override(f"++{override}", is_sweep=is_sweep)
    if not assigned:
        return override
    if is_text(tuple(key.lstrip("+").split(".")), value):
        values = value.split(",") if is_sweep and not SWEEP_FUNCTION.match(value) else [value]
        return f"{key}={','.join(_quote_text(text) for text in values)}"
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return f"{key}={_quote(value)}"
    return override


def _quote_text(text: str) -> str:
    """Return a text as Hydra reads it back unchanged; a quoted one stays."""
    try:
        parsed = OverridesParser.create().parse_override(f"key={text}")
        is_unchanged = not parsed.is_sweep_override() and (parsed.value() == text or QUOTED.fullmatch(text))
    except HydraException:
        is_unchanged = False
    return text if is_unchanged else _quote(text)


def _quote(text: str) -> str:
    escaped = re.sub(r'(\\*)("|$)', lambda match: match[1] * 2 + ("\\" + match[2] if match[2] else ""), text)
    return f'"{escaped}"'


def swept_keys(overrides: Sequence[str]) -> set[str]:
    """Return the keys of the overrides with several values."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return {override.get_key_element().lstrip("+") for override in parsed if override.is_sweep_override()}


@cache
def register_defaults() -> None:
    """Register the defaults of all dataclasses with Hydra once, so that YAML files contain only differences.

    The network is omitted: its keys depend on its kind, so each file of the group `expert` lists them all.
    """
    defaults = to_jsonable(RunConfig())
    del defaults["expert"]["network"]
    ConfigStore.instance().store("dataclass_defaults", defaults)


def check_group_files(overrides: Sequence[str]) -> None:
    """Raise `ConfigError` for a missing file of an optional group, which Hydra would skip silently."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        group = override.key_or_group
        if group in OPTIONAL:
            known = _group_files(group)
            names = override.sweep_string_iterator() if override.is_sweep_override() else [override.value()]
            for name in names:
                if name not in known:
                    raise ConfigError(f"{group} must be one of {', '.join(known)}; got {group}={name}")


def explain_error(message: str, overrides: Sequence[str]) -> str:
    """Return Hydra's message, with the known keys if an override names an unknown one."""
    first = " ".join(message.partition("Config search path")[0].split())
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        if "/" not in key and f"'{key}'" in message and (unknown := _find_unknown(key.split("."))):
            parents, leaf = unknown
            known = known_keys(parents)
            close = difflib.get_close_matches(leaf, known, n=1)
            hint = f"; did you mean {'.'.join([*parents, close[0]])}?" if close else ""
            return f"{'.'.join([*parents, leaf])}: unknown key{hint}\n  known here: {', '.join(known)}"
    return f"{first}\n  got {' '.join(overrides)}\n  the groups and their files are in {config_folder()}"


def _find_unknown(parts: list[str]) -> tuple[tuple[str, ...], str] | None:
    """Return the first part of a key that the configuration lacks, with its parents; None if every part is known."""
    for depth, part in enumerate(parts):
        known = known_keys(tuple(parts[:depth]))
        if known and part not in known:
            return tuple(parts[:depth]), part
    return None
