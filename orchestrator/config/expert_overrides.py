"""Experts that differ: `experts.3.prediction=noise` is laid over `expert`, and becomes a whole recipe.

Keys are ids, or several at once: `0-3`, `1,5`. A later key wins over an earlier one. Checkpoints to start from get
their checksums here, so that the configuration of a run says what was in them when it was composed.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ddm_core.artifacts import ArtifactError
from experts.config import ExpertConfig
from experts.networks.pretrained_files import InitError, init_checksum
from orchestrator.errors import ConfigError

TAG = "kind"
"""The key that says which keys its neighbours may be: another kind begins with its own defaults."""


def complete_expert_overrides(composed: Mapping[str, Any]) -> dict[str, Any]:
    """The composed configuration with every entry of `experts` laid over `expert`; raises `ConfigError`."""
    values = dict(composed)
    if isinstance(values.get("expert"), Mapping):
        values["expert"] = _with_checksum(values["expert"])
    given = values.get("experts")
    if not isinstance(given, Mapping):
        return values
    whole: dict[int, Any] = {}
    base = apply_overrides(asdict(ExpertConfig()), values.get("expert", {}))
    for key, overrides in given.items():
        for expert_id in ids_in(str(key)):
            whole[expert_id] = _with_checksum(_own(apply_overrides(whole.get(expert_id, base), overrides), overrides))
    return values | {"experts": whole}


def apply_overrides(base: Any, overrides: Any) -> Any:
    """`base` with the keys of `overrides` in place of its own, at every depth."""
    if not isinstance(base, Mapping) or not isinstance(overrides, Mapping):
        return overrides
    if TAG in overrides and overrides[TAG] != base.get(TAG):
        return dict(overrides)
    return dict(base) | {key: apply_overrides(base.get(key), value) for key, value in overrides.items()}


def ids_in(key: str) -> list[int]:
    """The expert ids that a key such as `3`, `0-3` or `1,5` names."""
    found: list[int] = []
    for part in key.split(","):
        first, dash, last = (word.strip() for word in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigError(
                f"experts.{key}: not an expert's id; write experts.3, or a key such as 0-3 or 1,5 in YAML"
            )
        found += range(int(first), int(last or first) + 1)
    return found


def _own(recipe: Any, overrides: Any) -> Any:
    """Without the base's checksum where another folder was given."""
    is_other = isinstance(overrides, Mapping) and "init" in overrides and "init_checksum" not in overrides
    return {key: value for key, value in recipe.items() if key != "init_checksum"} if is_other else recipe


def _with_checksum(recipe: Any) -> Any:
    if not isinstance(recipe, Mapping) or not isinstance(recipe.get("init"), str) or recipe.get("init_checksum"):
        return recipe
    folder = Path(recipe["init"]).expanduser().absolute()
    try:
        return dict(recipe) | {"init": str(folder), "init_checksum": init_checksum(folder)}
    except (InitError, ArtifactError) as error:
        raise ConfigError(str(error)) from None
