"""Convert a pool to the islands of `ddm run`: one island for each type of nodes."""

from ddm_core.artifacts import to_jsonable
from orchestrator.config.compute import IslandConfig
from orchestrator.pools.config import NodeConfig, PoolConfig
from orchestrator.pools.providers.ray_launcher import USABLE_MEMORY, get_resource_name
from orchestrator.pools.providers.skypilot import select_launched
from orchestrator.pools.yaml_text import to_yaml


def build_islands(config: PoolConfig) -> dict[str, IslandConfig]:
    """Return one island for each type that may have nodes, all with the pool's address and token.

    A stage that waits too long or is lost too often on a spot island is placed on the on-demand island: this is the
    pool's fallback. SkyPilot falls back by itself, inside one island.
    """
    types = select_launched(config) if config.provider == "skypilot" else config.nodes
    return {
        f"{config.name}_{name}": _build_island(config, name, node) for name, node in types.items() if node.max_nodes
    }


def render_islands(config: PoolConfig) -> str:
    """Render the islands as YAML for `compute`, with only the values that differ from the defaults."""
    defaults = to_jsonable(IslandConfig(address="http://localhost", token_file="", storage="/"))
    rendered = {
        name: {key: value for key, value in to_jsonable(island).items() if value != defaults[key]}
        for name, island in build_islands(config).items()
    }
    comment = f"Pool {config.name} as islands; every stage there waits until its node is up."
    return to_yaml({"backend": "islands", "islands": rendered}, comment=comment)


def _build_island(config: PoolConfig, name: str, node: NodeConfig) -> IslandConfig:
    return IslandConfig(
        address=config.address,
        token_file=str(config.token_path),
        storage=config.storage_url,
        cpus=node.cpus * node.max_nodes,
        gpus=float(node.gpus * node.max_nodes),
        memory_gb=round(node.memory_gb * node.max_nodes * USABLE_MEMORY, 1),
        resources={get_resource_name(name): 1.0},
        price_per_hour=node.price_per_hour * node.max_nodes,
        preemptible=node.spot,
        preemptions_per_hour=node.preemptions_per_hour,
    )
