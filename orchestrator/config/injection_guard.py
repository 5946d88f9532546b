"""What a configuration must not say, whoever wrote it: names of Python objects, Hydra's inner settings, lookups.

Hydra calls whatever `_target_` or a logging setting names, and `${oc.env:…}` would copy a secret into manifests and
logs. Nothing of ours is chosen by a dotted path, so all of it is refused, before Hydra composes and again after.
"""

import re
from collections.abc import Mapping, Sequence

from orchestrator.errors import ConfigError

HYDRA_KEYS = re.compile(r"hydra[/.](launcher|sweeper)(\..+)?|hydra\.sweep\.dir")
"""The settings of Hydra that belong to a sweep; the others can load files and call functions."""

CALLS = re.compile(r"_(target|args|partial|recursive|convert)_")
"""Keys by which Hydra makes a mapping into a call."""

LOOKUP = re.compile(r"\$\{[^}]*[:$]")
"""An interpolation that calls a resolver, or makes up the name of one; `${folder}` does neither."""


def check_overrides(overrides: Sequence[str]) -> None:
    """Raise `ConfigError` for an override that reaches for more than this project's own keys."""
    for override in overrides:
        key, _, value = override.partition("=")
        key = key.lstrip("+~")
        if key.startswith("hydra") and not HYDRA_KEYS.fullmatch(key):
            raise ConfigError(
                f"{override}: of Hydra's own settings only launcher, sweeper and sweep.dir can be changed"
            )
        if CALLS.search(key) or re.search(rf"{CALLS.pattern}['\"]?\s*:", value):
            raise ConfigError(f"{override}: it would call a Python object by its name; choose by the known keys")
        _refuse_lookup(key, value)


def check_composed(value: object, where: str = "") -> None:
    """The same for a configuration as Hydra has composed it, its interpolations not yet resolved."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            place = f"{where}.{key}" if where else str(key)
            if CALLS.fullmatch(str(key)):
                raise ConfigError(f"{place} would call a Python object by its name ({inner!r}); leave the key out")
            check_composed(inner, place)
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            check_composed(inner, f"{where}.{number}")
    elif isinstance(value, str):
        _refuse_lookup(where, value)


def _refuse_lookup(where: str, text: str) -> None:
    if LOOKUP.search(text):
        raise ConfigError(f"{where}: {text!r} looks something up outside the configuration; write the value itself")
