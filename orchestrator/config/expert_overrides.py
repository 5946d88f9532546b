"""Per-expert overrides: `experts.3.prediction=noise` is merged into `expert` and becomes a complete configuration.

A key is an id or several ids: `0-3`, `1,5`. A later key overrides an earlier one. Pretrained checkpoints get their
checksums here, so the configuration of a run records their contents at the time it was composed.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ddm_core.artifacts import ArtifactError
from experts.config import ExpertConfig
from experts.networks.autoencoder_files import path_checksum
from experts.networks.pretrained_files import InitError, init_checksum
from orchestrator.errors import ConfigError

TAG_KEY = "kind"
"""The key that selects the type of its mapping; with another kind, the base's values are dropped."""


def complete_expert_overrides(composed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the composed configuration with every entry of `experts` merged into `expert`; raises `ConfigError`."""
    values = dict(composed)
    if isinstance(values.get("expert"), Mapping):
        values["expert"] = _add_checksum(values["expert"])
    if isinstance(values.get("codec"), Mapping):
        values["codec"] = _add_path_checksum(values["codec"])
    overrides_by_key = values.get("experts")
    if not isinstance(overrides_by_key, Mapping):
        return values
    complete: dict[int, Any] = {}
    base = apply_overrides(asdict(ExpertConfig()), values.get("expert", {}))
    for key, overrides in overrides_by_key.items():
        for expert_id in parse_expert_ids(str(key)):
            merged = apply_overrides(complete.get(expert_id, base), overrides)
            complete[expert_id] = _add_checksum(_drop_base_checksum(merged, overrides))
    return values | {"experts": complete}


def apply_overrides(base: Any, overrides: Any) -> Any:
    """Return `base` with its keys replaced by those of `overrides`, at every depth."""
    if not isinstance(base, Mapping) or not isinstance(overrides, Mapping):
        return overrides
    if TAG_KEY in overrides and overrides[TAG_KEY] != base.get(TAG_KEY):
        return dict(overrides)
    return dict(base) | {key: apply_overrides(base.get(key), value) for key, value in overrides.items()}


def parse_expert_ids(key: str) -> list[int]:
    """Return the expert ids of a key such as `3`, `0-3` or `1,5`."""
    ids: list[int] = []
    for part in key.split(","):
        first, dash, last = (text.strip() for text in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigError(
                f"keys of experts must be expert ids; got experts.{key}; write experts.3, or 0-3 or 1,5 in YAML"
            )
        ids += range(int(first), int(last or first) + 1)
    return ids


def _drop_base_checksum(config: Any, overrides: Any) -> Any:
    """Remove the base's checksum if the overrides name another checkpoint folder."""
    is_other = isinstance(overrides, Mapping) and "init" in overrides and "init_checksum" not in overrides
    return {key: value for key, value in config.items() if key != "init_checksum"} if is_other else config


def _add_path_checksum(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Record the contents of a published autoencoder; a folder becomes absolute, a name on the Hub stays."""
    path = config.get("path")
    if not isinstance(path, str) or config.get("path_checksum"):
        return config
    folder = Path(path).expanduser().absolute()
    path = str(folder) if folder.is_dir() else path
    return dict(config) | {"path": path, "path_checksum": path_checksum(path)}


def _add_checksum(config: Any) -> Any:
    if not isinstance(config, Mapping) or not isinstance(config.get("init"), str) or config.get("init_checksum"):
        return config
    folder = Path(config["init"]).expanduser().absolute()
    try:
        return dict(config) | {"init": str(folder), "init_checksum": init_checksum(folder)}
    except (InitError, ArtifactError) as error:
        raise ConfigError(str(error)) from None
