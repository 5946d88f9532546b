"""Configuration of Ray's cluster launcher for any cloud: software, token, types of nodes, no public address.

Every key is set, because the launcher's defaults are a nightly Ray without a token and a dashboard on all addresses.
"""

from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.pools.config import HeadConfig, NodeConfig, PoolConfig
from orchestrator.pools.providers.node_setup import (
    build_export_command,
    build_install_command,
    build_start_command,
    build_token_command,
)

HEAD = "head"
GCS_PORT = 6379
USABLE_MEMORY = 0.7
"""Fraction of a node's memory that Ray assigns to stages; the rest is for its object store."""

BuildMachine = Callable[[HeadConfig, bool], dict[str, Any]]
"""Maps a machine, and whether it is spot, to the arguments of the cloud's API."""


def build_launcher_config(
    config: PoolConfig, *, provider: Mapping[str, Any], build_machine: BuildMachine, autoscaler: tuple[str, ...]
) -> dict[str, Any]:
    """Return the launcher's configuration; `autoscaler` are the packages with which the head calls the cloud."""
    head = {
        "node_config": build_machine(config.head, False),
        "resources": {"CPU": 0},
        "min_workers": 0,
        "max_workers": 0,
    }
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
        "auth": _build_auth(config),
        "available_node_types": {
            HEAD: head,
            **{name: _build_cloud_node_type(name, node, build_machine) for name, node in config.nodes.items()},
        },
        "head_node_type": HEAD,
        "file_mounts": {"~/.ray/auth_token": str(config.token_path)},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        "initialization_commands": [],
        "setup_commands": [build_token_command(), build_install_command(config.packages)],
        "head_setup_commands": [build_install_command(autoscaler)],
        "worker_setup_commands": [],
        **_build_start_commands(config),
    }


def get_resource_name(name: str) -> str:
    """Return the Ray resource that only nodes of this type have; an island's jobs request 1 of it."""
    return f"pool_{name}"


def build_node_type(
    name: str, node: NodeConfig, node_config: Mapping[str, Any], memory: Mapping[str, int]
) -> dict[str, Any]:
    """Return a type of nodes for Ray's autoscaler; `memory` has its bytes by Ray's resource name."""
    amounts = {"CPU": node.cpus, "GPU": node.gpus, **memory}
    return {
        "node_config": dict(node_config),
        "resources": {
            **{key: amount for key, amount in amounts.items() if amount},
            get_resource_name(name): node.slots,
        },
        "min_workers": node.min_nodes,
        "max_workers": node.max_nodes,
    }


def _build_cloud_node_type(name: str, node: NodeConfig, build_machine: BuildMachine) -> dict[str, Any]:
    memory = {"memory": int(node.memory_gb * USABLE_MEMORY * 2**30)}
    return build_node_type(name, node, build_machine(node, node.spot), memory)


def _build_auth(config: PoolConfig) -> dict[str, Any]:
    network = config.network
    proxy = {"ssh_proxy_command": network.ssh_proxy_command, "ssh_proxy_use_node_id": True}
    return {"ssh_user": network.ssh_user, **(proxy if network.ssh_proxy_command else {})}


def _build_start_commands(config: PoolConfig) -> dict[str, list[str]]:
    head = (
        "--head",
        f"--port={GCS_PORT}",
        "--num-cpus=0",
        "--autoscaling-config=~/ray_bootstrap_config.yaml",
        "--dashboard-host=127.0.0.1",
        "--dashboard-port=8265",
    )
    export = build_export_command(config.start_timeout_s)
    return {
        "head_start_ray_commands": ["ray stop", f"{export}; {build_start_command(*head)}"],
        "worker_start_ray_commands": [
            "ray stop",
            f"{export}; {build_start_command(f'--address=$RAY_HEAD_IP:{GCS_PORT}')}",
        ],
    }
