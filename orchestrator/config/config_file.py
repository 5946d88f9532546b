"""A YAML file with the same keys as the command line: `ddm run --config faces.yaml key=value`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from orchestrator.errors import ConfigError


def read_overrides(path: Path) -> list[str]:
    """Return the overrides of a file, in its order; raises `ConfigError` if it holds no keys, or those of a run."""
    try:
        contents = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path} cannot be read ({error}); write one with `ddm init FOLDER`") from None
    if not isinstance(contents, Mapping):
        raise ConfigError(f"--config {path} must hold keys and values, such as `data.path: /photos`; it holds none")
    if "format" in contents:
        raise ConfigError(f"--config {path} is the record of a run; continue it with `ddm resume {path.parent}`")
    return list(_flatten(contents))


def _flatten(values: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={value if isinstance(value, str) else _to_hydra(value)}"


def _to_hydra(value: Any) -> str:
    """Return a value in Hydra's grammar."""
    if isinstance(value, list):
        return f"[{','.join(map(_to_hydra, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{_to_hydra(item)}' for key, item in value.items())}}}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f'"{value}"' if isinstance(value, str) else str(value)
