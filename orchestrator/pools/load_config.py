"""Load a typed pool from a file of `cluster_configs/pool`, or one of your own, and overrides."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from orchestrator.config.schema import format_mistakes
from orchestrator.errors import ConfigError
from orchestrator.pools.config import HeadConfig, KubernetesConfig, NetworkConfig, NodeConfig, PoolConfig

PARTS: dict[str, type] = {
    "head": HeadConfig,
    "nodes": NodeConfig,
    "network": NetworkConfig,
    "kubernetes": KubernetesConfig,
}


def load_pool(folder: Path, name: str, overrides: Sequence[str]) -> PoolConfig:
    """Load the pool `name` of a folder of YAML files, or the YAML file `name`, with `key=value` overrides."""
    file = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise ConfigError(f"no pool {name!r}; known: {known}, or a YAML file of your own")
    if invalid := [text for text in overrides if "=" not in text]:
        raise ConfigError(f"overrides are key=value, such as nodes.l4_spot.max_nodes=4; given: {' '.join(invalid)}")
    assignments = [f"{text}''" if text.endswith("=") else text for text in overrides]
    try:
        merged = OmegaConf.merge({"name": file.stem}, OmegaConf.load(file), OmegaConf.from_dotlist(assignments))
        return parse_pool(OmegaConf.to_container(merged, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{file} with {' '.join(overrides) or 'no overrides'}: {error}") from None


def parse_pool(composed: Any) -> PoolConfig:
    """Return the typed pool; raise `ConfigError` with every mistake and, for unknown keys, the known ones."""
    try:
        return TypeAdapter(PoolConfig).validate_python(composed)
    except ValidationError as error:
        raise ConfigError(format_mistakes(error, "pool", _list_known_keys)) from None


def _list_known_keys(location: Sequence[str | int]) -> list[str]:
    kind: Any = PARTS[str(location[0])] if location else PoolConfig
    fields: dict[str, FieldInfo] = kind.__pydantic_fields__
    return sorted(fields)
