"""Reject configurations that could run code or read secrets: Python names, Hydra's internal settings, lookups.

Hydra calls the object that `_target_` or a logging setting names, and `${oc.env:…}` copies a secret into manifests and
logs. This project selects nothing by a dotted path, so all of these are rejected before Hydra composes and again
afterwards.
"""

import re
from collections.abc import Mapping, Sequence

from data_partition.shards.untrusted import is_printable
from orchestrator.errors import ConfigError

HYDRA_KEYS = re.compile(r"hydra[/.](launcher|sweeper)(\..+)?|hydra\.sweep\.dir")
"""Hydra's settings that belong to a sweep; all others can load files and call functions."""

CALL_KEYS = re.compile(r"_(target|args|partial|recursive|convert)_")
"""Keys by which Hydra turns a mapping into a call."""

LOOKUP = re.compile(r"\$\{[^}]*[:$]")
"""An interpolation that calls a resolver, or computes the name of one; `${folder}` does neither."""


def check_overrides(overrides: Sequence[str]) -> None:
    """Raise `ConfigError` for an override of keys outside this project's configuration."""
    for override in overrides:
        key, _, value = override.partition("=")
        key = key.lstrip("+~")
        if key.startswith("hydra") and not HYDRA_KEYS.fullmatch(key):
            raise ConfigError(
                f"{override}: of Hydra's own settings only launcher, sweeper and sweep.dir can be changed"
            )
        if CALL_KEYS.search(key) or re.search(rf"{CALL_KEYS.pattern}['\"]?\s*:", value):
            raise ConfigError(f"{override}: it would call a Python object by its name; use the known keys")
        _reject_lookup(key, value)


def check_composed(value: object, where: str = "") -> None:
    """Raise `ConfigError` for such keys in a composed configuration with unresolved interpolations."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            place = f"{where}.{key}" if where else str(key)
            if CALL_KEYS.fullmatch(str(key)):
                raise ConfigError(f"{place} would call a Python object by its name ({inner!r}); leave the key out")
            check_composed(inner, place)
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            check_composed(inner, f"{where}.{number}")
    elif isinstance(value, str):
        _reject_lookup(where, value)


def check_printable(value: object, where: str = "") -> None:
    """Raise `ConfigError` for a key or a text with control characters, which could rewrite a terminal or a script."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            check_printable(str(key), where)
            check_printable(inner, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for inner in value:
            check_printable(inner, where)
    elif isinstance(value, str) and not is_printable(value):
        raise ConfigError(f"{where}: {value[:100]!r} has control characters or halves of characters; leave them out")


def _reject_lookup(where: str, text: str) -> None:
    if LOOKUP.search(text):
        raise ConfigError(f"{where}: {text!r} reads a value from outside the configuration; write the value itself")
