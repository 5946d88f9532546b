"""A Ray cluster with autoscaling on loopback; other Ray clusters on this machine are not affected."""

import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import requests

from ddm_core.artifacts import read_json, write_json
from orchestrator.errors import IslandError
from orchestrator.islands.client import IslandClient
from orchestrator.islands.local.processes import create_scratch, delete_scratch
from orchestrator.islands.local.ray_head import (
    ADDRESS,
    OBJECT_STORE_BYTES,
    PORTS,
    Head,
    find_free_blocks,
)
from orchestrator.pools.config import PoolConfig
from orchestrator.pools.island_config import build_islands
from orchestrator.pools.providers.ray_launcher import build_node_type
from orchestrator.pools.shell import PoolError
from orchestrator.pools.yaml_text import to_yaml
from orchestrator.run.marked_processes import find_marked_processes, kill_marked_processes

HEAD_TYPE = "ray.head.default"
PROVIDER = "ddm_local_nodes.LocalNodes"
"""The autoscaler's import path of a copy of `local_node_provider.py`, the only code of this project that it imports."""


def render_local(config: PoolConfig) -> dict[str, str]:
    """Return `pool.yaml` for the autoscaler of a head on loopback, which reads the file again at every update.

    Ray has no defaults for this provider, so each key is needed.
    """
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    lists = ("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands")
    commands = ("head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    launcher: dict[str, Any] = {
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
                name: build_node_type(name, node, {}, {"object_store_memory": OBJECT_STORE_BYTES})
                for name, node in config.nodes.items()
            },
        },
        "head_node_type": HEAD_TYPE,
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{key: [] for key in (*lists, *commands)},
    }
    return {
        "pool.yaml": to_yaml(launcher, comment=f"Pool {config.name} for the autoscaler of a Ray cluster on loopback.")
    }


STATE = "local.json"
"""File in the pool's folder with the place of its temporary files; it exists while they or processes do."""
CODE = "code"
START_S = 120.0
"""Longest wait until the head responds; a cold disk is slow."""


def check(config: PoolConfig, folder: Path) -> None:
    """Raise `PoolError` or `IslandError` if the pool cannot start here."""
    if remaining(config, folder):
        raise PoolError(f"pool {config.name} is up already; end it first with `ddm pool down {config.name}`")
    find_free_blocks(1, config.first_port)


def up(config: PoolConfig, folder: Path) -> None:
    """Start the head, whose autoscaler reads `pool.yaml` in `folder`; return when it accepts jobs."""
    head = _create_head(config, folder)
    head.make_folders()
    _copy_provider(head.scratch)
    write_json(folder / STATE, {"scratch": str(head.scratch)})
    process = head.launch()
    try:
        _wait_until_ready(config, head, process)
    except PoolError:
        down(config, folder)
        raise


def down(config: PoolConfig, folder: Path) -> None:
    """Kill every process of the pool, jobs included, and delete its temporary files."""
    kill_marked_processes(str(folder))
    if (folder / STATE).exists():
        delete_scratch(Path(read_json(folder / STATE)["scratch"]))
        (folder / STATE).unlink()


def remaining(config: PoolConfig, folder: Path) -> list[str]:
    """Return the processes of the pool, jobs included."""
    return [f"process {pid}" for pid in find_marked_processes(str(folder))]


def _copy_provider(scratch: Path) -> None:
    copy = scratch / CODE / f"{PROVIDER.partition('.')[0]}.py"
    copy.parent.mkdir()
    shutil.copyfile(Path(__file__).with_name("local_node_provider.py"), copy)


def _create_head(config: PoolConfig, folder: Path) -> Head:
    scratch = create_scratch()
    environment = {
        "PYTHONPATH": str(scratch / CODE),
        "RAY_AUTH_TOKEN_PATH": str(config.token_path),
        "RAY_JOB_START_TIMEOUT_SECONDS": f"{config.start_timeout_s:.0f}",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "0",  # needs a file that Ray's wheel does not have
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "AUTOSCALER_METRIC_PORT": "-1",  # no port, because it would need no token
    }
    return Head(
        folder=folder,
        scratch=scratch,
        first_port=config.first_port,
        cpus=0,
        is_durable=False,
        environment=environment,
        autoscaling=folder / "pool.yaml",
    )


def _wait_until_ready(config: PoolConfig, head: Head, process: subprocess.Popen[bytes]) -> None:
    """Wait until the Jobs API responds, and the agent that starts jobs, which is ready last."""
    name, island = next(iter(build_islands(config).items()))
    deadline = time.monotonic() + START_S
    while True:
        try:
            IslandClient(name, island).check_reachable()
            token = config.token_path.read_text(encoding="utf-8")
            url = f"{head.agent}/api/local_raylet_healthz"
            requests.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=5).raise_for_status()
        except (IslandError, requests.RequestException) as error:
            if process.poll() is not None or time.monotonic() > deadline:
                last_lines = " / ".join(head.log.read_text(errors="replace").splitlines()[-3:])
                raise PoolError(f"the pool's head does not respond ({error}): {last_lines}; see {head.log}") from error
            time.sleep(0.2)
        else:
            return
