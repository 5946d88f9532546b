"""This machine: Ray's own test of autoscaling, which starts a raylet for every node that a cloud would start."""

from typing import Any

from orchestrator.islands.head import ADDRESS, OBJECT_STORE_BYTES, PORTS
from orchestrator.pools.config import PoolConfig
from orchestrator.pools.document import as_yaml
from orchestrator.pools.launcher import node_type

HEAD_TYPE = "ray.head.default"
PROVIDER = "ddm_local_nodes.LocalNodes"
"""The autoscaler's import path of `local_nodes.py`, whose copy is all that it sees of our code."""


def render_local(config: PoolConfig) -> dict[str, str]:
    """`pool.yaml` for the autoscaler of a head on loopback; it reads the file again at every look.

    Ray keeps no defaults for this provider, so each key is needed.
    """
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    lists = ("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands")
    commands = ("head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    written: dict[str, Any] = {
        "cluster_name": config.cluster_name,
        "max_workers": sum(node.max_nodes for node in config.nodes.values()),
        "upscaling_speed": 100.0,
        "idle_timeout_minutes": config.idle_minutes,
        "docker": {},
        "provider": {
            "type": "external",
            "module": PROVIDER,
            "gcs_address": f"{ADDRESS}:{config.first_port + PORTS['--port']}",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "auth": {},
        "available_node_types": {
            HEAD_TYPE: head,
            **{
                name: node_type(name, node, {}, {"object_store_memory": OBJECT_STORE_BYTES})
                for name, node in config.nodes.items()
            },
        },
        "head_node_type": HEAD_TYPE,
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{key: [] for key in (*lists, *commands)},
    }
    return {"pool.yaml": as_yaml(written, about=f"Pool {config.name} for the autoscaler of a Ray cluster on loopback.")}
