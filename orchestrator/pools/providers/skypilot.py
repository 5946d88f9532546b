"""SkyPilot: one task for each spot type and its fallback, which SkyPilot itself changes over to; size is fixed.

Beside Ray the task runs a watch on the Jobs API, since to SkyPilot a Ray cluster that waits looks busy for ever.
"""

import json
from pathlib import Path
from typing import Any

from orchestrator.pools.config import NodeConfig, PoolConfig, dashed
from orchestrator.pools.providers.node_setup import PYTHON_VERSION, environment, guard_token, install, start_ray
from orchestrator.pools.providers.ray_launcher import GCS_PORT, resource
from orchestrator.pools.shell import PoolError, require_tool, run_command, tool_output
from orchestrator.pools.yaml_text import as_yaml

LOOK_S = 60
AGENT = "--dashboard-agent-listen-port=52375"
CLIENTS = "--ray-client-server-port=10101"
"""Ports at which SkyPilot's own Ray listens otherwise, and would be given our jobs."""

FINISH = """\
idle=0
while [ "$idle" -lt {looks} ] && kill -0 "$head"; do
  sleep {look_s}
  idle=$((idle + 1))
  if ray job list --address=http://127.0.0.1:8265 | grep -Eq "JobStatus.(PENDING|RUNNING)"; then idle=0; fi
done
kill "$head"
"""


def render_skypilot(config: PoolConfig) -> dict[str, str]:
    """`TYPE.yaml` for `sky launch`, for every type that does not stand in for another."""
    return {
        f"{name}.yaml": as_yaml(
            _task(config, name, node),
            about=f"Pool {config.name} for SkyPilot: `sky launch -c {sky_name(config, name)}`.",
        )
        for name, node in launched(config).items()
    }


def launched(config: PoolConfig) -> dict[str, NodeConfig]:
    """The types that are launched: neither withdrawn nor standing in for one that is launched."""
    present = {name: node for name, node in config.nodes.items() if node.max_nodes}
    fallbacks = {node.fallback for node in present.values()}
    return {name: node for name, node in present.items() if name not in fallbacks}


def sky_name(config: PoolConfig, name: str) -> str:
    """SkyPilot's name for the machines of one type."""
    return f"{config.cluster_name}-{dashed(name)}"


def _task(config: PoolConfig, name: str, node: NodeConfig) -> dict[str, Any]:
    choices = [node] if node.fallback is None else [node, config.nodes[node.fallback]]
    path = 'export PATH="$HOME/ddm/bin:$PATH"'
    return {
        "name": sky_name(config, name),
        "num_nodes": node.max_nodes,
        "resources": {
            "ordered": [_candidate(config, choice) for choice in choices],
            "disk_size": node.disk_gb,
            "labels": {**config.tags, "ddm-pool": config.name},
            "autostop": {"idle_minutes": 1, "down": True},
        },
        "file_mounts": {"~/.ray/auth_token": str(config.token)},
        "setup": "\n".join([*_python(), path, install(config.packages), guard_token()]) + "\n",
        "run": "\n".join([path, _run(config, name, node)]),
    }


def _candidate(config: PoolConfig, node: NodeConfig) -> dict[str, Any]:
    asked: dict[str, Any] = {"cpus": f"{node.cpus}+", "memory": f"{node.memory_gb:g}+", "use_spot": node.spot}
    if config.region:
        asked["infra"] = config.region
    if node.gpu:
        asked["accelerators"] = f"{node.gpu}:{node.gpus}"
    if node.machine:
        asked["instance_type"] = node.machine
    if config.machine_image:
        asked["image_id"] = config.machine_image
    return asked


def _python() -> list[str]:
    """Our version of Python apart from SkyPilot's own, which must be left alone."""
    version = f"python{PYTHON_VERSION}"
    packages = f"{version} {version}-venv"
    return [
        f"command -v {version} || (sudo apt-get update && sudo apt-get install -y {packages})",
        f'test -x "$HOME/ddm/bin/pip" || {version} -m venv "$HOME/ddm"',
    ]


def _run(config: PoolConfig, name: str, node: NodeConfig) -> str:
    """The head works too; it ends, and with it the pool, when no job has been there for `idle_minutes`."""
    own = f"""--resources='{{"{resource(name)}": {node.slots}}}'"""
    head = (
        "--head",
        f"--port={GCS_PORT}",
        "--dashboard-host=127.0.0.1",
        "--dashboard-port=8265",
        AGENT,
        CLIENTS,
        own,
        "--block",
    )
    worker = (f'--address="$(echo "$SKYPILOT_NODE_IPS" | head -n1):{GCS_PORT}"', AGENT, own, "--block")
    looks = max(1, round(config.idle_minutes * 60 / LOOK_S))
    return "\n".join(
        [
            environment(config.start_timeout_s),
            'if [ "$SKYPILOT_NODE_RANK" != 0 ]; then',
            f"  {start_ray(*worker)}",
            "  exit 0",
            "fi",
            f"{start_ray(*head)} &",
            "head=$!",
            FINISH.format(looks=looks, look_s=LOOK_S),
        ]
    )


def check(config: PoolConfig, folder: Path) -> None:
    """`sky`, and a cloud that it may use."""
    clouds = _said([_sky(), "check", "--output=json"])
    if not any(clouds.values()):
        raise PoolError("SkyPilot may use no cloud; `sky check` says what each lacks")


def up(config: PoolConfig, folder: Path) -> None:
    """`sky launch` for each type; it comes back when the task runs."""
    for name in launched(config):
        where = ["--cluster", sky_name(config, name), str(folder / f"{name}.yaml")]
        run_command([_sky(), "launch", "--yes", "--detach-run", *where])


def down(config: PoolConfig, folder: Path) -> None:
    """`sky down` for each type that is still known."""
    if names := remaining(config, folder):
        run_command([_sky(), "down", "--yes", *names])


def remaining(config: PoolConfig, folder: Path) -> list[str]:
    """The pool's names among those that SkyPilot, after asking the clouds, still knows."""
    known = {one["name"] for one in _said([_sky(), "status", "--refresh", "--output=json"])}
    return sorted(known & {sky_name(config, name) for name in launched(config)})


def _said(command: list[str]) -> Any:
    """The JSON that a command prints, after what SkyPilot says of its own server."""
    text = tool_output(command)
    lines = text.splitlines()
    first = next((number for number, line in enumerate(lines) if line.startswith(("[", "{"))), 0)
    try:
        return json.loads("\n".join(lines[first:]))
    except json.JSONDecodeError:
        raise PoolError(f"SkyPilot's answer is not JSON: {text[:200]}; try `sky status`") from None


def _sky() -> str:
    return require_tool("sky", "run `pip install skypilot[aws]` in an environment of its own and put it on the PATH")
