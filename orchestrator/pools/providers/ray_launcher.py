"""What Ray's cluster launcher is told, whatever the cloud: software, token, types of nodes, nothing public.

Every key is given, because the launcher fills what is missing from defaults of its own: a nightly Ray without a token,
and a dashboard on all addresses.
"""

from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.pools.config import HeadConfig, NodeConfig, PoolConfig
from orchestrator.pools.providers.node_setup import environment, guard_token, install, start_ray

HEAD = "head"
GCS_PORT = 6379
USABLE_MEMORY = 0.7
"""Share of a node's memory that Ray gives to stages; the rest is its object store's."""

Machine = Callable[[HeadConfig, bool], dict[str, Any]]
"""From a machine, and whether it is spot, to what the cloud's API is asked."""


def launcher(
    config: PoolConfig, *, provider: Mapping[str, Any], machine: Machine, autoscaler: tuple[str, ...]
) -> dict[str, Any]:
    """The launcher's configuration; `autoscaler` are the packages with which the head calls the cloud."""
    head = {"node_config": machine(config.head, False), "resources": {"CPU": 0}, "min_workers": 0, "max_workers": 0}
    return {
        "cluster_name": config.cluster_name,
        "max_workers": sum(node.max_nodes for node in config.nodes.values()),
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": config.idle_minutes,
        "docker": {
            "image": config.image,
            "container_name": "ray",
            "pull_before_run": True,
            "run_options": ["--ulimit nofile=65536:65536"],
        },
        "provider": {**provider, "use_internal_ips": True},
        "auth": _auth(config),
        "available_node_types": {
            HEAD: head,
            **{name: _node_type(name, node, machine) for name, node in config.nodes.items()},
        },
        "head_node_type": HEAD,
        "file_mounts": {"~/.ray/auth_token": str(config.token)},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        "initialization_commands": [],
        "setup_commands": [guard_token(), install(config.packages)],
        "head_setup_commands": [install(autoscaler)],
        "worker_setup_commands": [],
        **_start_commands(config),
    }


def resource(name: str) -> str:
    """The Ray resource that only nodes of this type have; an island's jobs ask for 1 of it."""
    return f"pool_{name}"


def node_type(name: str, node: NodeConfig, node_config: Mapping[str, Any], memory: Mapping[str, int]) -> dict[str, Any]:
    """A type of nodes for Ray's autoscaler; `memory` is what is counted of it, by Ray's name."""
    counted = {"CPU": node.cpus, "GPU": node.gpus, **memory}
    return {
        "node_config": dict(node_config),
        "resources": {**{key: amount for key, amount in counted.items() if amount}, resource(name): node.slots},
        "min_workers": node.min_nodes,
        "max_workers": node.max_nodes,
    }


def _node_type(name: str, node: NodeConfig, machine: Machine) -> dict[str, Any]:
    return node_type(name, node, machine(node, node.spot), {"memory": int(node.memory_gb * USABLE_MEMORY * 2**30)})


def _auth(config: PoolConfig) -> dict[str, Any]:
    network = config.network
    proxy = {"ssh_proxy_command": network.ssh_proxy_command, "ssh_proxy_use_node_id": True}
    return {"ssh_user": network.ssh_user, **(proxy if network.ssh_proxy_command else {})}


def _start_commands(config: PoolConfig) -> dict[str, list[str]]:
    head = (
        "--head",
        f"--port={GCS_PORT}",
        "--num-cpus=0",
        "--autoscaling-config=~/ray_bootstrap_config.yaml",
        "--dashboard-host=127.0.0.1",
        "--dashboard-port=8265",
    )
    before = environment(config.start_timeout_s)
    return {
        "head_start_ray_commands": ["ray stop", f"{before}; {start_ray(*head)}"],
        "worker_start_ray_commands": ["ray stop", f"{before}; {start_ray(f'--address=$RAY_HEAD_IP:{GCS_PORT}')}"],
    }
