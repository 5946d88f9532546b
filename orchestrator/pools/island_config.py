"""A pool as islands: what `ddm run` needs to be told, one island for each type of nodes."""

from ddm_core.artifacts import to_jsonable
from orchestrator.config.compute import IslandConfig
from orchestrator.pools.config import NodeConfig, PoolConfig
from orchestrator.pools.providers.ray_launcher import USABLE_MEMORY, resource
from orchestrator.pools.providers.skypilot import launched
from orchestrator.pools.yaml_text import as_yaml


def islands(config: PoolConfig) -> dict[str, IslandConfig]:
    """One island for each type that may have nodes, all at the pool's address and with its token.

    A stage that waits too long or is lost too often on a spot island goes to the on-demand one: that is how a pool
    falls back. SkyPilot falls back by itself, inside one island.
    """
    types = launched(config) if config.provider == "skypilot" else config.nodes
    return {f"{config.name}_{name}": _island(config, name, node) for name, node in types.items() if node.max_nodes}


def render_islands(config: PoolConfig) -> str:
    """The islands as YAML to put below `compute.islands`, with only what differs from the defaults."""
    ordinary = to_jsonable(IslandConfig(address="http://localhost", token_file="", storage="/"))
    written = {
        name: {key: value for key, value in to_jsonable(island).items() if value != ordinary[key]}
        for name, island in islands(config).items()
    }
    about = f"Pool {config.name} as islands; every stage there waits until its node is up."
    return as_yaml({"backend": "islands", "islands": written}, about=about)


def _island(config: PoolConfig, name: str, node: NodeConfig) -> IslandConfig:
    return IslandConfig(
        address=config.address,
        token_file=str(config.token),
        storage=config.stored,
        cpus=node.cpus * node.max_nodes,
        gpus=float(node.gpus * node.max_nodes),
        memory_gb=round(node.memory_gb * node.max_nodes * USABLE_MEMORY, 1),
        resources={resource(name): 1.0},
        price_per_hour=node.price_per_hour * node.max_nodes,
        preemptible=node.spot,
        preemptions_per_hour=node.preemptions_per_hour,
    )
