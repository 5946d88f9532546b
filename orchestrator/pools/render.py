"""Render a pool: one function for each provider, from the configuration to YAML files by name."""

from collections.abc import Callable

from orchestrator.pools.config import PoolConfig
from orchestrator.pools.island_config import render_islands
from orchestrator.pools.providers.aws import render_aws
from orchestrator.pools.providers.gcp import render_gcp
from orchestrator.pools.providers.kuberay import render_kuberay
from orchestrator.pools.providers.local import render_local
from orchestrator.pools.providers.skypilot import render_skypilot

RENDERERS: dict[str, Callable[[PoolConfig], dict[str, str]]] = {
    "aws": render_aws,
    "gcp": render_gcp,
    "kuberay": render_kuberay,
    "skypilot": render_skypilot,
    "local": render_local,
}


def render(config: PoolConfig) -> dict[str, str]:
    """Return the files of the provider's tool by name, and `islands.yaml` for `ddm run`; none contains a secret."""
    return {**RENDERERS[config.provider](config), "islands.yaml": render_islands(config)}
