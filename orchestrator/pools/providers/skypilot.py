"""SkyPilot: one task of fixed size for each spot type; SkyPilot itself switches to the type's fallback.

The task also polls the Jobs API, because SkyPilot never detects that a waiting Ray cluster is idle.
"""

import json
from pathlib import Path
from typing import Any

from orchestrator.pools.config import NodeConfig, PoolConfig, hyphenate
from orchestrator.pools.providers.node_setup import (
    PYTHON_VERSION,
    build_export_command,
    build_install_command,
    build_start_command,
    build_token_command,
)
from orchestrator.pools.providers.ray_launcher import GCS_PORT, get_resource_name
from orchestrator.pools.shell import PoolError, require_tool, run_command, tool_output
from orchestrator.pools.yaml_text import to_yaml

POLL_INTERVAL_S = 60
AGENT = "--dashboard-agent-listen-port=52375"
CLIENTS = "--ray-client-server-port=10101"
"""Ports that differ from those of SkyPilot's own Ray, which would otherwise receive the jobs."""

EXIT_WHEN_IDLE = """\
idle=0
while [ "$idle" -lt {polls} ] && kill -0 "$head"; do
  sleep {poll_interval_s}
  idle=$((idle + 1))
  if ray job list --address=http://127.0.0.1:8265 | grep -Eq "JobStatus.(PENDING|RUNNING)"; then idle=0; fi
done
kill "$head"
"""


def render_skypilot(config: PoolConfig) -> dict[str, str]:
    """Return `TYPE.yaml` for `sky launch`, for every type that is not the fallback of another."""
    return {
        f"{name}.yaml": to_yaml(
            _build_task(config, name, node),
            comment=f"Pool {config.name} for SkyPilot: `sky launch -c {get_sky_name(config, name)}`.",
        )
        for name, node in select_launched(config).items()
    }


def select_launched(config: PoolConfig) -> dict[str, NodeConfig]:
    """Return the types to launch: not disabled, and not the fallback of a launched one."""
    enabled = {name: node for name, node in config.nodes.items() if node.max_nodes}
    fallbacks = {node.fallback for node in enabled.values()}
    return {name: node for name, node in enabled.items() if name not in fallbacks}


def get_sky_name(config: PoolConfig, name: str) -> str:
    """Return SkyPilot's name for the machines of one type."""
    return f"{config.cluster_name}-{hyphenate(name)}"


def _build_task(config: PoolConfig, name: str, node: NodeConfig) -> dict[str, Any]:
    choices = [node] if node.fallback is None else [node, config.nodes[node.fallback]]
    path = 'export PATH="$HOME/ddm/bin:$PATH"'
    return {
        "name": get_sky_name(config, name),
        "num_nodes": node.max_nodes,
        "resources": {
            "ordered": [_build_candidate(config, choice) for choice in choices],
            "disk_size": node.disk_gb,
            "labels": {**config.tags, "ddm-pool": config.name},
            "autostop": {"idle_minutes": 1, "down": True},
        },
        "file_mounts": {"~/.ray/auth_token": str(config.token_path)},
        "setup": "\n".join(
            [*_build_python_setup(), path, build_install_command(config.packages), build_token_command()]
        )
        + "\n",
        "run": "\n".join([path, _build_run_script(config, name, node)]),
    }


def _build_candidate(config: PoolConfig, node: NodeConfig) -> dict[str, Any]:
    candidate: dict[str, Any] = {"cpus": f"{node.cpus}+", "memory": f"{node.memory_gb:g}+", "use_spot": node.spot}
    if config.region:
        candidate["infra"] = config.region
    if node.gpu:
        candidate["accelerators"] = f"{node.gpu}:{node.gpus}"
    if node.machine:
        candidate["instance_type"] = node.machine
    if config.machine_image:
        candidate["image_id"] = config.machine_image
    return candidate


def _build_python_setup() -> list[str]:
    """Return commands that install the local version of Python, separate from SkyPilot's own, which must not change."""
    version = f"python{PYTHON_VERSION}"
    packages = f"{version} {version}-venv"
    return [
        f"command -v {version} || (sudo apt-get update && sudo apt-get install -y {packages})",
        f'test -x "$HOME/ddm/bin/pip" || {version} -m venv "$HOME/ddm"',
    ]


def _build_run_script(config: PoolConfig, name: str, node: NodeConfig) -> str:
    """Return the run script; the head also runs jobs, and ends the pool after `idle_minutes` without a job."""
    resources = f"""--resources='{{"{get_resource_name(name)}": {node.slots}}}'"""
    head = (
        "--head",
        f"--port={GCS_PORT}",
        "--dashboard-host=127.0.0.1",
        "--dashboard-port=8265",
        AGENT,
        CLIENTS,
        resources,
        "--block",
    )
    worker = (f'--address="$(echo "$SKYPILOT_NODE_IPS" | head -n1):{GCS_PORT}"', AGENT, resources, "--block")
    polls = max(1, round(config.idle_minutes * 60 / POLL_INTERVAL_S))
    return "\n".join(
        [
            build_export_command(config.start_timeout_s),
            'if [ "$SKYPILOT_NODE_RANK" != 0 ]; then',
            f"  {build_start_command(*worker)}",
            "  exit 0",
            "fi",
            f"{build_start_command(*head)} &",
            "head=$!",
            EXIT_WHEN_IDLE.format(polls=polls, poll_interval_s=POLL_INTERVAL_S),
        ]
    )


def check(config: PoolConfig, folder: Path) -> None:
    """Check `sky`, and that it may use a cloud."""
    clouds = _run_json([_require_sky(), "check", "--output=json"])
    if not any(clouds.values()):
        raise PoolError("SkyPilot may use no cloud; `sky check` lists what each lacks")


def up(config: PoolConfig, folder: Path) -> None:
    """Run `sky launch` for each type; it returns when the task runs."""
    for name in select_launched(config):
        options = ["--cluster", get_sky_name(config, name), str(folder / f"{name}.yaml")]
        run_command([_require_sky(), "launch", "--yes", "--detach-run", *options])


def down(config: PoolConfig, folder: Path) -> None:
    """Run `sky down` for each remaining type."""
    if names := remaining(config, folder):
        run_command([_require_sky(), "down", "--yes", *names])


def remaining(config: PoolConfig, folder: Path) -> list[str]:
    """Return the pool's clusters that SkyPilot still lists after refreshing from the clouds."""
    listed = {cluster["name"] for cluster in _run_json([_require_sky(), "status", "--refresh", "--output=json"])}
    return sorted(listed & {get_sky_name(config, name) for name in select_launched(config)})


def _run_json(command: list[str]) -> Any:
    """Return the JSON that a command prints, without SkyPilot's messages before it."""
    text = tool_output(command)
    lines = text.splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith(("[", "{"))), 0)
    try:
        return json.loads("\n".join(lines[start:]))
    except json.JSONDecodeError:
        raise PoolError(f"SkyPilot's output is not JSON: {text[:200]}; try `sky status`") from None


def _require_sky() -> str:
    return require_tool("sky", "run `pip install skypilot[aws]` in an environment of its own and put it on the PATH")
